"""Run under torchrun: every mode from beginning to end, by the loop itself, at several layouts.

usage: torchrun --nproc-per-node N tests/ranks/modes.py FOLDER LAYOUT ...      LAYOUT as tp2; FOLDER holds data/, model/, sft/ and reward/
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import layout_keys

from rlhf import configuration
from rlhf.assemble import build, checked_ledger
from rlhf.config import Config, Memory
from rlhf.interrupt import Interrupt
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Phase
from rlhf.prepare import inputs, rule
from rlhf.rewards import Rewards

STEPS, CHECKPOINT = 3, 2
# What a run says of its first samples, where the models that it compares are still equal: mode -> (step, metric, value).
STEP_ZERO = {
    "reward": [(0, "eval_loss", math.log(2)), (0, "eval_accuracy", 0.5)],
    "dpo": [(0, "eval_loss", math.log(2)), (1, "loss", math.log(2)), (1, "margin", 0.0)],
    "online-dpo": [(1, "loss", math.log(2)), (1, "margin", 0.0)],
    "grpo": [(1, "kl", 0.0), (1, "clipped", 0.0)],
    "rlhf": [(1, "kl", 0.0), (2, "lr", 0.75e-4)],  # the policy warms up from its own first update
    "sft": [],
}
UNLIKE = ("time/", "memory/", "tokens_per_second", "mismatch")  # differ between layouts, or are noise
KEYS = {
    "sft": ["optim.lr=1e-3"],
    "reward": ["optim.lr=1e-3"],
    "dpo": ["optim.lr=1e-3"],
    "online-dpo": ["rollout.group=4", "dpo.pairs=all"],
    "grpo": ["rollout.group=4"],
    "rlhf": ["rollout.group=1", "batch.minibatches=2", "ppo.kl_target=1", "ppo.kl_horizon=1000", "ppo.reward_scale=true"]
    + ["ppo.critic_warmup=1", "optim.warmup=2"],
}
COMMON = ["data.max_tokens=80", "batch.prompts=6", "batch.tokens=512", "optim.lr=1e-4", "evaluate.prompts=8", "evaluate.show=0"]
COMMON += ["rollout.engine=kvcache", "rollout.max_tokens=16", f"checkpoint.every={CHECKPOINT}", "checkpoint.keep=3", f"steps={STEPS}"]


def configure(folder: Path, mode: str, layout: str) -> Config:
    kind = mode if mode in ("sft", "reward", "dpo") else "prompts"
    data = [f"data.train={folder}/data/train_{kind}.jsonl", f"data.eval={folder}/data/dev_{kind}.jsonl"]
    load = [f"policy.load={folder}/{'model' if mode == 'sft' else 'sft'}"]
    if kind == "prompts":
        load.append(f"reward.load={folder}/reward")
    return configuration.load(mode, [*COMMON, *KEYS[mode], *layout_keys(layout), *data, *load, f"out={folder}/{layout}/{mode}"])


def train(config: Config, mesh: Mesh) -> None:
    limits = (config.reward.timeout, config.reward.workers)
    with Rewards(rule(config), *limits) as rewards:
        given = inputs(config, mesh.world)
        run = build(config, mesh, given, checked_ledger(config, mesh, given), rewards, rewards, Interrupt())
        enter = run.roles.residence.enter

        def watched(phase: Phase, role: str = "policy") -> None:
            """Whoever else uses the device, the engine sleeps."""
            enter(phase, role)
            engine = run.source.owner.engine if run.algorithm.online else None
            awake = engine and any(weight.untyped_storage().nbytes() for weight in engine.parameters().values())
            assert not awake or phase in (Phase.PUBLISH, Phase.ROLLOUT), f"the engine is awake in phase {phase}"

        run.roles.residence.enter = watched
        run.train()


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: value for name, value in row.items() if not name.startswith(UNLIKE)} for row in rows}


def check_step_zero(mode: str, found: dict[int, dict[str, float]]) -> None:
    for step, name, wanted in STEP_ZERO[mode]:
        assert abs(found[step][name] - wanted) < 1e-5, f"{mode}: {name} is {found[step][name]} at step {step}"


def check_split(folder: Path, mode: str, found: dict[int, dict[str, float]]) -> None:
    """Every metric of every step is that of one rank."""
    wanted = metrics(folder / "tp1" / mode)
    assert found.keys() == wanted.keys()
    for step, row in wanted.items():
        assert found[step].keys() == row.keys(), f"{mode}: {found[step].keys() ^ row.keys()}"
        even = {name.replace("margin", "accuracy") for name, value in row.items() if name.endswith("margin") and abs(value) < 1e-5}
        for name, value in row.items():
            if name in even:  # models that are equal up to rounding: which wins is a coin
                continue
            assert math.isclose(found[step][name], value, rel_tol=1e-3, abs_tol=1e-5), (
                f"{mode} step {step}: {name} {found[step][name]} != {value}"
            )


def check_resume(config: Config, mesh: Mesh, mode: str) -> None:
    """A run that starts again from its next to last checkpoint, now with everything parked, ends bit by bit where it ended before."""
    out = Path(config.out)
    files = sorted(path.name for path in (out / f"step_{STEPS:06}").glob("*.pt") if not path.name.startswith("random"))
    before = {name: torch.load(out / f"step_{STEPS:06}" / name) for name in files}
    rows = metrics(out)
    mesh.barrier()
    if mesh.rank == 0:
        (out / "latest").write_text(f"step_{CHECKPOINT:06}")
    mesh.barrier()
    train(replace(config, memory=Memory(offload="all")), mesh)
    assert metrics(out) == rows, f"{mode}: metrics differ after resuming"
    for name in files:
        after = torch.load(out / f"step_{STEPS:06}" / name)
        assert equal(before[name], after), f"{mode}: {name} differs after resuming"


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main() -> None:
    folder, layouts = Path(sys.argv[1]), sys.argv[2:]
    for layout in layouts:
        mesh = Mesh(configure(folder, "sft", layout).parallel, 1)
        for mode in KEYS:
            config = configure(folder, mode, layout)
            train(config, mesh)
            found = metrics(Path(config.out))
            check_step_zero(mode, found)
            check_split(folder, mode, found)
            check_resume(config, mesh, f"{mode} at {layout}")
        mesh.close()
    mesh.barrier()
    if mesh.rank == 0:
        print("modes agree", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
