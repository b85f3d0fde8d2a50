"""Run under torchrun: two models, trained and scored in turns, are bitwise equal with and without offload.

usage: torchrun --nproc-per-node N tests/ranks/parking.py FOLDER LAYOUT ...

A LAYOUT is like tp2-pp1-sp0-zero1. Each is run in float32 and bfloat16.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import groups
from models import layout_keys, samples

from rlhf import configuration
from rlhf.algorithms import ALGORITHMS
from rlhf.data.packing import microbatches, shares
from rlhf.ledger import GIB, LOGITS, Ledger
from rlhf.model import architecture
from rlhf.model.logp import CHUNK_ELEMENTS
from rlhf.parallel.mesh import Mesh
from rlhf.phases import TENANTS, Kind, Phase, Tenant
from rlhf.residence import Residence
from rlhf.shapes import shapes
from rlhf.train.learner import Learner
from rlhf.weights import files, names

ALL = {Tenant(role, kind) for role, use in (("policy", "train"), ("reference", "frozen")) for kind in TENANTS[use]}
POLICY = Tenant("policy", Kind.WEIGHTS)


class Pair:
    """A trained policy and a frozen reference at one layout, which share one host memory for offload."""

    def __init__(self, folder: Path, layout: str, dtype: torch.dtype):
        self.config = configuration.load(
            "grpo", [*layout_keys(layout), f"policy.load={folder}", "data.max_tokens=128", "rollout.max_tokens=64"]
        )
        self.mesh = Mesh(self.config.parallel, 1)
        self.arch, self.dtype = architecture.read(folder), dtype
        tiles = names.tilings(self.arch, "megatron", self.mesh.world, self.config.parallel.tp, self.config.parallel.pp)[
            self.mesh.rank
        ]
        self.fill = partial(files.read, folder, self.arch, tiles)
        share = shares(samples(), self.mesh.layout.dp, self.arch.hidden)[self.mesh.dp_rank]
        self.cut = microbatches(share, 300, False, self.mesh.largest)
        self.loss = partial(ALGORITHMS["grpo"](self.config).loss, "policy")

    def learner(self, train: bool) -> Learner:
        torch.manual_seed(1)  # for the padding of the vocabulary, which no file contains
        return Learner(self.arch, self.config, self.mesh, self.dtype, fill=self.fill, temperature=1.0, train=train)

    def train(self, offload: set[Tenant]) -> list[torch.Tensor]:
        """Do three steps with every phase.

        Return the outputs of both models in each, and the whole state of the policy.
        """
        parking, learners = Residence(offload, self.mesh.device), {}
        for role, train in (("policy", True), ("reference", False)):
            learners[role] = self.learner(train)
            parking.add(role, learners[role])
        said = []
        for _ in range(3):
            parking.enter(Phase.ROLLOUT)
            check_away(learners, offload)
            for role, learner in learners.items():
                parking.enter(Phase.SCORE, role)
                check_away(learners, offload - {Tenant(role, Kind.WEIGHTS)})
                said += map(torch.from_numpy, learner.score(self.cut))
            parking.enter(Phase.LEARN)
            for buffer in learners["policy"].model.buffers:
                buffer.grad_data.fill_(torch.nan)  # a dropped tenant may return with any content
            learners["policy"].learn(self.cut, self.loss, 0.01)
            parking.enter(Phase.PUBLISH)
            check_away(learners, offload - {POLICY})
            said += [p.float().clone() for p in learners["policy"].parameters().values()]
        parking.enter(Phase.SAVE)
        return said + [t.float().clone() for t in learners["policy"].optimizer.tensors()]

    def check_ledger(self) -> None:
        """Check that the ledger predicts a learner's memory to a few bytes.

        Buffers of a distributed optimizer are padded.
        """
        arch, roles = shapes(self.config, self.mesh.world)
        ledger = Ledger(self.config, arch, roles, self.mesh.world, float("inf"), self.dtype.itemsize)
        learner, seen = self.learner(train=True), set()
        learner.learn(self.cut, self.loss, 0.01)
        for kind, tensors in learner.tenants().items():
            storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors) if s._cdata not in seen}
            seen |= storages.keys()
            predicted = ledger.tenants[self.mesh.pp_rank][Tenant("policy", kind)] * GIB
            assert abs(sum(storages.values()) - predicted) < 8192, (
                f"{kind}: {sum(storages.values())} bytes, predicted {predicted}"
            )


def check_away(learners: dict[str, Learner], away: set[Tenant]) -> None:
    """Check that exactly the tenants `away` take no memory.

    Without a distributed optimizer, main parameters in float32 are the weights themselves.
    """
    for role, learner in learners.items():
        tenants = learner.tenants()
        weights = {t.untyped_storage()._cdata for t in tenants[Kind.WEIGHTS]}
        for kind, tensors in tenants.items():
            storages = {s._cdata: s for s in (t.untyped_storage() for t in tensors)}
            sizes = [s.nbytes() for key, s in storages.items() if kind == Kind.WEIGHTS or key not in weights]
            if Tenant(role, kind) in away:
                assert not any(sizes), f"{role}.{kind} is still on the device"
            else:
                assert all(sizes), f"{role}.{kind} is not on the device"


def main() -> None:
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    assert LOGITS == CHUNK_ELEMENTS
    for layout in layouts:
        for dtype in (torch.float32, torch.bfloat16):
            pair = Pair(folder, layout, dtype)
            pair.check_ledger()
            kept, parked = pair.train(set()), pair.train(ALL)
            assert all(torch.equal(a, b) for a, b in zip(kept, parked, strict=True)), f"{layout} {dtype}"
            assert all(a.isfinite().all() for a in kept)
            partly = pair.train({Tenant("policy", Kind.OPTIMIZER), Tenant("reference", Kind.WEIGHTS)})
            assert all(torch.equal(a, b) for a, b in zip(kept, partly, strict=True)), (
                f"{layout} {dtype}: some tenants parked"
            )
            groups.close()
    print("parking holds", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
