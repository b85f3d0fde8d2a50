"""Measure a publish: megatron-core shards -> vLLM's fused parameters, on one or more ranks.

    python benchmarks/publish.py                                                        one rank
    torchrun --nproc-per-node 2 benchmarks/publish.py --train-tp 2 --engine-tp 1        TP2 -> two engines of TP1
    torchrun --nproc-per-node 2 benchmarks/publish.py --train-pp 2 --engine-tp 2        PP2 -> TP2

The weights are random, in bfloat16, with Llama-2-7B's shapes. --engine vllm writes into a real engine, which sleeps
(and drops its weights) and wakes between publishes. The last line is JSON. The lower bound is the time of the same
bytes in the same run: one rank copies them on the device; several ranks send them to a neighbour and receive as many.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
import torch.distributed as dist

from rlhf import texts
from rlhf.model.architecture import Architecture
from rlhf.parallel.layout import Place
from rlhf.weights import names
from rlhf.weights.formats import hf
from rlhf.weights.plan import Plan
from rlhf.weights.publish import Publisher

SHAPES = {"family": "llama", "context": 4096, "eps": 1e-5, "tied": False, "rope_theta": 1e4}
MODELS = {
    "7b": Architecture(layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, **SHAPES),
    "8b": Architecture(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, **SHAPES),
    "toy": Architecture(layers=4, hidden=128, ffn=352, heads=4, kv_heads=4, head_dim=32, vocab=1000, **SHAPES),
}
CHUNK = 512 << 20  # bytes per copy or message when the lower bound is measured


class Ranks:
    """This rank, and timing over all ranks."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.on_gpu else torch.device("cpu")
        self.host = 0.0
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.on_gpu else "gloo")

    def wait(self) -> None:
        """Wait until all work is done on all ranks."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds of the slowest rank. self.host: seconds that this host needed to launch the work."""
        self.wait()
        start = time.perf_counter()
        work()
        self.host = time.perf_counter() - start
        if self.on_gpu:
            torch.cuda.synchronize()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    def copy_rate(self, size: int) -> float:
        """Return the bytes per second of copying a tensor on the device."""
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return size / min(self.seconds(lambda: target.copy_(source)) for _ in range(8))

    def link_rate(self, size: int) -> float:
        """Return the bytes per second in each direction when all ranks send to the next rank at once."""
        out, into = (
            torch.ones(size, dtype=torch.uint8, device=self.device),
            torch.empty(size, dtype=torch.uint8, device=self.device),
        )

        def exchange() -> None:
            to, of = (self.rank + 1) % self.world, (self.rank - 1) % self.world
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, out, to), dist.P2POp(dist.irecv, into, of)]):
                work.wait()

        return size / min(self.seconds(exchange) for _ in range(8))


def vllm_engine(arch: Architecture, tp: int, dtype: torch.dtype, memory: float) -> Any:
    """Return a vLLM engine that is ready for a publish."""
    from rlhf.rollout.vllm import VLLM

    with tempfile.TemporaryDirectory() as folder:
        texts.save(Path(folder) / "config.json", hf.description(arch))
        name = str(dtype).removeprefix("torch.")
        return VLLM(folder, tp=tp, dtype=name, seed=1, max_len=256, memory=memory, cache=0.0)


def options(arguments: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=MODELS, default="7b")
    p.add_argument("--train-tp", type=int, default=1)
    p.add_argument("--train-pp", type=int, default=1)
    p.add_argument("--engine-tp", type=int, default=1)
    p.add_argument(
        "--engine",
        choices=("parameters", "vllm"),
        default="parameters",
        help="plain tensors of vLLM's shapes, or a real engine",
    )
    p.add_argument("--memory", type=float, default=0.4, help="share of the device's memory for the vLLM engine")
    p.add_argument("--bucket", type=int, default=512, help="buffer memory in MB (rollout.bucket)")
    p.add_argument("--repeat", type=int, default=10)
    return p.parse_args(arguments)


def main(arguments: list[str]) -> None:
    a, ranks, dtype = options(arguments), Ranks(), torch.bfloat16
    arch = MODELS[a.model]
    engine = vllm_engine(arch, a.engine_tp, dtype, a.memory) if a.engine == "vllm" else None
    training = names.tilings(arch, "megatron", ranks.world, a.train_tp, a.train_pp)
    moves = Plan(training, names.tilings(arch, "vllm", ranks.world, a.engine_tp), [0] * ranks.world)
    publisher = Publisher(moves, ranks.rank, dtype, a.bucket << 20)
    source = {
        name: torch.randn(shape, dtype=dtype, device=ranks.device)
        for name, shape in names.shapes(training[ranks.rank]).items()
    }
    plain = {} if engine else names.parameters(arch, "vllm", Place((0, a.engine_tp)))
    target = {name: torch.zeros(shape, dtype=dtype, device=ranks.device) for name, shape in plain.items()}

    def parameters() -> dict[str, torch.Tensor]:
        return engine.parameters() if engine else target

    waking, taken, host = [0.0], [], []
    for _ in range(2 + a.repeat):
        if engine:
            engine.sleep()
            waking.append(ranks.seconds(engine.wake_weights))
        taken.append(ranks.seconds(lambda: publisher.publish(source, parameters())))
        host.append(ranks.host)
        if engine:
            engine.wake()  # an engine can only sleep again when it is fully awake
    publisher.verify(source, parameters())
    result = summary(ranks, moves, dtype, taken)
    result |= {"seconds_host": statistics.median(host), "seconds_waking": statistics.median(waking)}
    record.say("publish", "vllm" if engine else "", result)
    ranks.wait()
    os._exit(0)  # at a normal exit vLLM and torch.distributed would destroy each other's groups


def summary(ranks: Ranks, moves: Plan, dtype: torch.dtype, taken: list[float]) -> dict[str, Any]:
    """Return bytes, seconds, and the ratio to the lower bound."""
    seconds = statistics.median(taken[2:])  # the first two load kernels and allocate buffers
    busy: dict[tuple[str, int], int] = defaultdict(int)  # (what, rank) -> bytes
    for move in moves.moves:
        busy["held", move.target] += move.numel * dtype.itemsize
        if move.source != move.target:
            busy["sent", move.source] += move.numel * dtype.itemsize
            busy["received", move.target] += move.numel * dtype.itemsize
    held = max(size for (what, _), size in busy.items() if what == "held")
    crossing = max((size for (what, _), size in busy.items() if what != "held"), default=0)
    chunk = min(CHUNK, held)
    copy_rate, link_rate = ranks.copy_rate(chunk), ranks.link_rate(chunk) if ranks.world > 1 else 0.0
    floor = crossing / link_rate if crossing else held / copy_rate
    return {
        "bytes_per_engine_rank": held,
        "bytes_crossing_per_rank": crossing,
        "seconds": seconds,
        "seconds_best": min(taken[2:]),
        "seconds_first": taken[0],
        "copy_gb_per_s": copy_rate / 1e9,
        "link_gb_per_s": link_rate / 1e9,
        "floor_seconds": floor,
        "ratio": seconds / floor,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
