"""Run on one GPU: offload of a model of 0.9 B parameters and its reference is bitwise, and the ledger is right.

usage: python tests/ranks/memory.py FOLDER

FOLDER holds a config.json. The variables of torchrun are set.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

import numpy as np
import torch

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.contracts import Sample
from rlhf.ledger import Ledger
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Kind, Phase
from rlhf.residence import Residence, capacity
from rlhf.shapes import shapes
from rlhf.train.learner import Learner

TOKENS, LENGTH = 8192, 2048
TOLERANCE = 0.1  # share of the peak


def rows(vocab: int, count: int = 2) -> list[list[Sample]]:
    """Return full micro-batches."""
    rng = np.random.default_rng(1)
    whole = np.ones(LENGTH, bool)
    return [
        [Sample(rng.integers(0, vocab, LENGTH + 1).astype(np.int32), whole, group=i) for i in range(TOKENS // LENGTH)]
    ] * count


def fill(parameters: dict[str, torch.Tensor]) -> None:
    for name, tensor in parameters.items():
        tensor.fill_(1.0) if name.endswith("norm.weight") else tensor.normal_(std=0.02)


def take_turns(parking: Residence, learners: dict[str, Learner], batches: list[list[Sample]], loss: partial) -> None:
    """Do three steps with every phase of an offline mode."""
    for _ in range(3):
        for role, learner in learners.items():
            parking.enter(Phase.SCORE, role)
            learner.score(batches)
        parking.enter(Phase.LEARN)
        learners["policy"].learn(batches, loss, 1e-5)


def check_return(parking: Residence, learner: Learner, batches: list[list[Sample]]) -> None:
    """Check weights, moments and log-probs after a rollout: they are bitwise unchanged.

    The rollout has overwritten all free memory.
    """
    parking.enter(Phase.SAVE)
    kept = {kind: [t.to("cpu", copy=True) for t in learner.tenants()[kind]] for kind in (Kind.WEIGHTS, Kind.OPTIMIZER)}
    parking.enter(Phase.SCORE)
    said = learner.score(batches)
    begin = time.perf_counter()
    parking.enter(Phase.ROLLOUT)
    torch.cuda.synchronize()
    parked = time.perf_counter() - begin
    assert torch.cuda.memory_allocated() < 1 << 30, f"{torch.cuda.memory_allocated()} bytes are left on the device"
    free = torch.cuda.mem_get_info()[0] - (4 << 30)
    torch.full((free,), 255, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    parking.enter(Phase.SAVE)
    torch.cuda.synchronize()
    print(f"weights away in {parked:.2f} s; weights and optimizer back in {time.perf_counter() - begin:.2f} s")
    for kind, tensors in kept.items():
        assert all(torch.equal(a, b.cpu()) for a, b in zip(tensors, learner.tenants()[kind], strict=True)), (
            f"{kind} came back changed"
        )
    parking.enter(Phase.SCORE)
    assert all(np.array_equal(a, b) for a, b in zip(said, learner.score(batches), strict=True))


def main() -> None:
    overrides = [
        f"policy.load={sys.argv[1]}",
        f"batch.tokens={TOKENS}",
        f"data.max_tokens={LENGTH}",
        "memory.offload=all",
    ]
    config = configuration.load("dpo", overrides)
    mesh = Mesh(config.parallel, 1)
    arch, roles = shapes(config, 1)
    ledger = Ledger(config, arch, roles, 1, capacity(mesh.device), 2)
    parking, learners = Residence(ledger.offload, mesh.device), {}
    for name, role in roles.items():
        train = role.use == "train"
        learners[name] = Learner(arch, config, mesh, torch.bfloat16, fill=fill, temperature=1.0, train=train)
        parking.add(name, learners[name])
    batches = rows(arch.vocab)
    take_turns(parking, learners, batches, partial(ALGORITHMS["sft"](config).loss, "policy"))
    parking.measure()
    peaks = dict(parking.peaks)
    check_return(parking, learners["policy"], batches)
    print(ledger.table(peaks), flush=True)
    for phase, measured in peaks.items():
        assert abs(ledger.need(phase) / measured - 1) < TOLERANCE, (
            f"{phase}: predicted {ledger.need(phase):.2f}, measured {measured:.2f} GiB"
        )
    print("memory holds", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
