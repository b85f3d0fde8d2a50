"""Run under torchrun: engines get the weights of every training layout, twice, and must agree with transformers.

usage: torchrun --nproc-per-node N tests/ranks/publishing.py FOLDER ENGINE TP MODEL LAYOUT ...

FOLDER holds MODEL-old, MODEL-new and greedy.json. A LAYOUT is TPxPP, such as 2x1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rlhf.config import Parallel
from rlhf.contracts import Engine, Sampling
from rlhf.model import architecture
from rlhf.parallel.layout import spread
from rlhf.parallel.mesh import Mesh
from rlhf.rollout.kvcache import KVCache
from rlhf.weights import files, names
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher, mismatch


def build(kind: str, folder: Path, tp: int, mesh: Mesh) -> Engine:
    arch = architecture.read(folder)
    if kind == "kvcache":
        group = mesh.subgroup(tp)
        return KVCache(arch, tp=tp, tp_rank=mesh.rank % tp, group=group, dtype=torch.float32, device="cpu", max_len=64)
    from rlhf.rollout.vllm import VLLM

    return VLLM(str(folder), tp=tp, dtype="float32", seed=0, max_len=64, memory=0.1, cache=0.02)


def main() -> None:
    root, kind, engine_tp, model, layouts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:]
    expected = json.loads((root / "greedy.json").read_text())
    mesh, arch = Mesh(Parallel(), 1), architecture.read(root / f"{model}-old")
    engine = build(kind, root / f"{model}-old", engine_tp, mesh)
    engines = names.tilings(arch, "vllm", mesh.world, engine_tp)
    padded = names.tiles(arch, "vllm", spread(mesh.world, engine_tp).place(mesh.rank), pad=True)
    assert not mismatch(engine.parameters(), padded, torch.float32)
    for tp, pp in (map(int, layout.split("x")) for layout in layouts):
        training = names.tilings(arch, "megatron", mesh.world, tp, pp)
        publisher = Publisher(Plan(training, engines, mesh.nodes()), mesh.rank, torch.float32, bucket=1 << 18)
        for name in (f"{model}-old", f"{model}-new"):
            tiling = training[mesh.rank]
            weights = {local: torch.zeros(shape) for local, shape in names.shapes(tiling).items()}
            files.read(root / name, arch, tiling, weights)
            engine.sleep()
            engine.wake_weights()
            publisher.publish(weights, engine.parameters())
            publisher.verify(weights, engine.parameters())
            engine.wake()
            sampling = Sampling(max_tokens=8, temperature=0.0)
            done = [
                c.tokens for c in engine.generate(expected["prompts"], sampling, list(range(len(expected["prompts"]))))
            ]
            assert done == expected["tokens"][name], f"{name} from TP{tp} PP{pp} to {kind} TP{engine_tp}: {done}"
    print("engines agree", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
