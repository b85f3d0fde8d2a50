"""Runs that save two small roles as the training loop does, and the expected state after resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from rlhf import configuration
from rlhf.checkpoint import Checkpoints
from rlhf.parallel.layout import Layout, Place
from rlhf.parallel.mesh import Mesh
from rlhf.weights.shards import LiveShard, StoredShard

PLACE = {"rank": 0, "dp_rank": 0, "cp_rank": 0, "tp_rank": 0, "pp_rank": 0}
MESH = SimpleNamespace(
    **PLACE,
    layout=Layout(1, 1, 1, 1),
    device=torch.device("cpu"),
    ranks_per_node=1,
    barrier=lambda: None,
    all_gather=lambda x: [x],
    world=1,
)
MESH.agree = partial(Mesh.agree, MESH)


class Learner:
    """A learner with one weight and a number of updates."""

    def __init__(self, weight: float = 0.0) -> None:
        self.weight, self.updates = torch.tensor([weight]), 0

    def state(self) -> LiveShard:
        return LiveShard(self.updates, [], {"weight": 0}, {"main": {"weight": self.weight}})

    def load(self, files: list[tuple[Path, Place]]) -> None:
        stored = StoredShard(files[0][0], [])
        self.weight = stored.view("main", "weight", ((1,), (1,), 0)).clone()
        self.updates = stored.updates


class Run:
    """Two roles that learn, saved as a run saves them."""

    def __init__(self, out: Path, *overrides: str):
        self.out, self.roles, self.state = out, {"policy": Learner(), "critic": Learner(100.0)}, {"coefficient": 0.0}
        self.checkpoints = Checkpoints(configuration.load("rlhf", [f"out={out}", *overrides]), MESH, torch.float32)  # type: ignore[arg-type]

    def save(self, step: int, export: bool = False) -> None:
        for learner in self.roles.values():
            learner.weight, learner.updates = learner.weight + 1, step
        self.state["coefficient"] = step / 2
        self.checkpoints.save(step, self.roles.items(), self.state, self.export if export else None)
        self.checkpoints.settle(wait=True)

    def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_text(f"{folder.name} of {self.roles['policy'].updates}")

    def folders(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.out.glob("step_??????"))


def check_resumes_at(out: Path, step: int) -> None:
    """Check that all roles have the state of this step."""
    run = Run(out)
    assert run.checkpoints.resume(run.roles.items(), run.state) == step
    assert [learner.updates for learner in run.roles.values()] == [step, step]
    assert run.roles["critic"].weight - run.roles["policy"].weight == 100.0
    assert run.state == {"coefficient": step / 2}
