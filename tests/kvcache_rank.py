"""One rank of a tensor-parallel kvcache engine.

It is a separate module, so that a new process starts fast.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from rlhf.contracts import Sampling
from rlhf.model import architecture
from rlhf.rollout.kvcache import KVCache


def run(
    rank: int,
    kinds: list[str],
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int],
    max_len: int,
    path: Path,
) -> None:
    """For each kind of model, read path/kind/shards.pt and write path/kind/completions-{rank}.pt."""
    dist.init_process_group("gloo", store=dist.FileStore(str(path / "store"), 2), rank=rank, world_size=2)
    for kind in kinds:
        arch = architecture.read(path / kind)
        engine = KVCache(
            arch, tp=2, tp_rank=rank, group=dist.group.WORLD, dtype=torch.float32, device="cpu", max_len=max_len
        )
        shard = torch.load(path / kind / "shards.pt")[rank]
        assert {name: p.shape for name, p in engine.parameters().items()} == {
            name: p.shape for name, p in shard.items()
        }
        for name, tensor in shard.items():
            engine.parameters()[name].copy_(tensor)
        torch.save(engine.generate(prompts, sampling, seeds), path / kind / f"completions-{rank}.pt")
    dist.destroy_process_group()
