"""Checkpoints of every layout resume at every layout. tests/ranks/laws.py calls check() on 1, 2 and 4 ranks in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.algorithms import ALGORITHMS
from rlhf.checkpoint import Checkpoints
from rlhf.train.learner import Learner

LAYOUTS = {
    1: ["tp1-zero1", "tp1-zero0"],
    2: ["tp2", "pp2-zero0", "cp2-zero1", "dp2-zero1", "dp2-zero0"],
    4: ["tp4", "pp4", "cp4", "cp4-zero0", "dp4", "dp4-zero0", "tp2-pp2", "tp2-dp2", "tp2-dp2-zero0", "tp2-cp2"]
    + ["pp2-cp2", "pp2-dp2", "pp2-dp2-zero0"],
}
STEP = 2  # updates before the save


def checkpoints(case: Any, out: Path, dtype: torch.dtype) -> Checkpoints:
    return Checkpoints(dataclasses.replace(case.config, out=str(out)), case.mesh, dtype)


def update(case: Any, learner: Learner, rate: float) -> float:
    """Make one update. Return the loss before it."""
    loss = partial(ALGORITHMS["grpo"](case.config).loss, "policy")
    sums = case.mesh.all_gather(learner.learn(case.cut(10_000), loss, rate).get("loss", (0.0, 0.0)))
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    """Return copies of the weights and of this rank's optimizer state, without padding of the vocabulary."""
    state = learner.state()
    held = {f"{kind}.{name}": t for kind, each in state.tensors.items() for name, t in each.items()}
    return {name: t.clone() for name, t in (held | learner.parameters()).items()}


def check(case_of: Callable[[str], Any], world: int, root: Path, dtype: torch.dtype, rate: float) -> None:
    """Save at every layout of this number of ranks, and resume at each from all checkpoints so far.

    The state is the same bitwise, whatever layout saved it, and two more updates have the losses of the run that saved
    the first checkpoint.
    """
    base, wanted = root / "base", root / "losses"
    if not base.exists():
        case = case_of(LAYOUTS[world][0])
        learner = case.learner(True, dtype)
        for _ in range(STEP):
            update(case, learner, rate)
        checkpoints(case, base, dtype).save(STEP, {"policy": learner}.items(), {})
        losses = [update(case, learner, rate) for _ in range(2)]
        if case.mesh.rank == 0:
            wanted.write_text(repr(losses))
        case.mesh.barrier()
        case.mesh.close()
    for turn in ("save", "resume"):
        for layout in LAYOUTS[world]:
            case = case_of(layout)
            learner = case.learner(True, dtype)
            assert checkpoints(case, base, dtype).resume({"policy": learner}.items(), {}) == STEP
            if turn == "save":
                checkpoints(case, root / f"at-{layout}", dtype).save(STEP, {"policy": learner}.items(), {})
            else:
                check_layout(case, learner, sorted(root.glob("at-*")), dtype)
                near = 1e-6 if dtype == torch.float32 else 2e-2
                for loss in map(float, wanted.read_text().strip("[]").split(",")):
                    found = update(case, learner, rate)
                    assert abs(found - loss) < near, f"{case.what}: loss {found} instead of {loss}"
            case.mesh.close()


def check_layout(case: Any, learner: Learner, saved: list[Path], dtype: torch.dtype) -> None:
    right = snapshot(learner)
    for folder in saved:
        other = case.learner(True, dtype)
        assert checkpoints(case, folder, dtype).resume({"policy": other}.items(), {}) == STEP
        assert other.optimizer.updates == STEP
        found = snapshot(other)
        assert found.keys() == right.keys()
        odd = [name for name in right if not torch.equal(found[name], right[name])]
        assert not odd, f"{case.what}: {folder.name} differs in {odd}"
