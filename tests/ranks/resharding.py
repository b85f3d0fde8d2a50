"""Checkpoints resume at other layouts. tests/ranks/laws.py calls check() on 1, 2 and 4 ranks in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import groups
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
    """Resume at every layout of this number of ranks from the checkpoint of the layout before it, and save there.

    The first checkpoint is that of a run at the first layout. Each layout loads it too: the state is the same bitwise.
    Two more updates have the losses of the first run. tests/test_shards.py has all pairs of layouts.
    """
    base, wanted, last = root / "base", root / "losses", root / "last"
    if not base.exists():
        case = case_of(LAYOUTS[world][0])
        learner = case.learner(True, dtype)
        for _ in range(STEP):
            update(case, learner, rate)
        save(case, learner, base, dtype)
        losses = [update(case, learner, rate) for _ in range(2)]
        if case.mesh.rank == 0:
            wanted.write_text(repr(losses))
            last.write_text(str(base))
        case.mesh.barrier()
        groups.close()
    # With float32 the main parameters are the weights. With bfloat16 they are others, so fewer layouts are enough.
    for layout in LAYOUTS[world][:: 1 if dtype == torch.float32 else 3]:
        case = case_of(layout)
        learner = case.learner(True, dtype)
        right, found = (load(case, learner, folder, dtype) for folder in (base, Path(last.read_text())))
        assert found.keys() == right.keys()
        odd = [name for name in right if not torch.equal(found[name], right[name])]
        assert not odd, f"{case.what}: {last.read_text()} differs in {odd}"
        out = root / f"at-{layout}"
        save(case, learner, out, dtype)
        if case.mesh.rank == 0:
            last.write_text(str(out))
        near = 1e-6 if dtype == torch.float32 else 2e-2
        for loss in map(float, wanted.read_text().strip("[]").split(",")):
            changed = update(case, learner, rate)
            assert abs(changed - loss) < near, f"{case.what}: loss {changed} instead of {loss}"
        groups.close()


def save(case: Any, learner: Learner, folder: Path, dtype: torch.dtype) -> None:
    saved = checkpoints(case, folder, dtype)
    saved.save(STEP, {"policy": learner}.items(), {})
    saved.settle(wait=True)


def load(case: Any, learner: Learner, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a learner whose state is ruined first. Return a copy of its state."""
    with torch.no_grad():
        for tensor in (*learner.parameters().values(), *learner.optimizer.tensors()):
            tensor.fill_(7)
    assert checkpoints(case, folder, dtype).resume({"policy": learner}.items(), {}) == STEP
    assert learner.optimizer.updates == STEP
    return snapshot(learner)
