"""Measure the cost of switching between training and generation.

This is the engine's sleep and wake, and the offload of the learner to host memory and back.

python benchmarks/switch.py                                                one GPU: Llama-2-7B; 4 layers are offloaded
python benchmarks/switch.py --rollout                                      first benchmarks/rollout.py, with this engine
python benchmarks/switch.py --model toy --layers 2 --prompts 4 --new 8     on a CPU, without sleep
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import record
import rollout
import torch
from publish import MODELS
from train import LR, draw, fill

from rlhf.algorithms import ALGORITHMS
from rlhf.data.packing import microbatches
from rlhf.phases import TENANTS, Kind, Phase, Tenant
from rlhf.residence import Residence
from rlhf.rollout.source import EngineSource
from rlhf.train.learner import Learner

KINDS = TENANTS["train"]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of a call, and the GiB of device memory that it freed (negative: allocated)."""
    record.wait()
    before, start = free(), time.perf_counter()
    work()
    record.wait()
    return time.perf_counter() - start, free() - before


def free() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


def engine(sampler: EngineSource, rounds: int) -> None:
    moves = {
        "sleep": partial(sampler.owner.leave, ()),
        "wake_weights": partial(sampler.owner.come, (Kind.WEIGHTS,)),
        "wake": partial(sampler.owner.come, (Kind.WEIGHTS, Kind.CACHE)),
    }
    found = defaultdict(list)
    for _ in range(rounds):
        for name in moves:
            found[name].append(timed(moves[name]))
    result = {f"{name}_s": statistics.median(s for s, _ in pairs) for name, pairs in found.items()}
    result |= {f"{name}_first_s": pairs[0][0] for name, pairs in found.items()}
    record.say("switch", "engine", result | {f"{name}_gib": abs(pairs[-1][1]) for name, pairs in found.items()})


def parking(a: argparse.Namespace, sampler: EngineSource, rounds: int) -> None:
    """Measure the offload of one trained model: weights, gradients and optimizer."""
    config, mesh, arch = sampler.config, sampler.mesh, replace(MODELS[a.model], layers=a.layers)
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    sampler.owner.leave(())
    lot = Residence({Tenant("policy", kind) for kind in KINDS}, mesh.device)
    learner = Learner(arch, config, mesh, dtype, fill=fill, temperature=1.0, train=True)
    lot.add("policy", learner)
    loss = partial(ALGORITHMS["sft"](config).loss, "policy")
    cut = microbatches(draw(1024, 128, arch.vocab, False), 1024, False)
    found = defaultdict(list)
    for _ in range(rounds):
        found["unpark"].append(timed(partial(lot.enter, Phase.LEARN))[0])
        learner.learn(cut, loss, LR)
        found["park"].append(timed(partial(lot.enter, Phase.ROLLOUT))[0])
    gib = {
        kind: sum(t.nbytes for t in learner.tenants()[kind]) / 2**30 for kind in KINDS
    }  # after an update, with moments
    moved = gib["weights"] + gib["optimizer"]
    result = {
        "model": a.model,
        "layers": a.layers,
        "parameters": arch.num_parameters(),
        **{f"{kind}_gib": gib[kind] for kind in KINDS},
    }
    for name, taken in found.items():
        result |= {f"{name}_first_s": taken[0], f"{name}_s": taken[-1], f"{name}_gib_per_s": moved / taken[-1]}
    record.say("switch", "parking", result)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rollout.add_options(p)
    p.add_argument("--layers", type=int, default=4, help="layers of the offloaded model")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--rollout", action="store_true", help="measure the rollout first")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sampler = rollout.build(a, Path(folder))
        if a.rollout:
            rollout.measure(a, sampler)
        engine(sampler, a.rounds)
        parking(a, sampler, a.rounds)
    os._exit(0)  # at a normal exit vLLM and torch.distributed would destroy each other's groups


if __name__ == "__main__":
    main()
