"""Run under torchrun: every mode in the training loop, from beginning to end, at several layouts.

usage: torchrun --nproc-per-node N tests/ranks/modes.py FOLDER LAYOUT[:MODE,...] ...

A LAYOUT is like tp2. FOLDER holds data/, model/, sft/, reward/ and rules.py. It also holds the results of one rank,
with which other layouts are compared.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import groups
from models import layout_keys

from rlhf import configuration
from rlhf.assemble import build, checked_ledger
from rlhf.config import Config, Memory
from rlhf.contracts import Sample
from rlhf.data.records import Records
from rlhf.interrupt import Interrupt
from rlhf.loop import Run
from rlhf.parallel.mesh import Mesh
from rlhf.phases import Phase
from rlhf.prepare import inputs
from rlhf.rewards import Rewards, rule

STEPS, CHECKPOINT = 3, 2
# Metrics of the first samples, while the compared models are still equal: mode -> (step, metric, value).
STEP_ZERO = {
    "reward": [(0, "eval_loss", math.log(2)), (0, "eval_accuracy", 0.5)],
    "dpo": [(0, "eval_loss", math.log(2)), (1, "loss", math.log(2)), (1, "margin", 0.0)],
    "online-dpo": [(1, "loss", math.log(2)), (1, "margin", 0.0)],
    "grpo": [(1, "kl", 0.0), (1, "clipped", 0.0)],
    "rlhf": [(1, "kl", 0.0)],
    "sft": [],
}
# Metrics that change with two updates: mode -> (metric of step 3, least magnitude). Before, a model is compared with
# itself.
MOVED = {"dpo": ("margin", 0.05), "online-dpo": ("margin", 1e-4), "grpo": ("kl", 1e-5), "rlhf": ("kl", 1e-4)}
# Mean learning rates of the steps, by hand: warm-up over two updates, then linear to 0. The policy's schedule begins
# with its first update.
RATES = {"lr": {2: 0.75e-4, 3: 0.75e-4}, "critic_lr": {1: 2.25e-4, 2: 2.625e-4, 3: 1.125e-4}}
PAIRS = {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}
JUDGED = {"reward", "reward_rule", "reward_score", "reward_failed", "response_tokens", "truncated"}
CREDIT = {"shaped_reward", "kl", "kl_coefficient", "values", "returns", "advantages", "explained_variance"}
NAMES = {  # mode -> the metrics of a loss, and those of a step's samples
    "sft": ({"loss", "entropy"}, set()),
    "reward": ({"loss", "accuracy", "margin", "score"}, set()),
    "dpo": (PAIRS, set()),
    "online-dpo": (PAIRS, {*JUDGED, "tied", "lone", "reward_gap"}),
    "grpo": ({"loss", "clipped", "entropy", "kl", "mismatch"}, {*JUDGED, "silent", "lone"}),
    "rlhf": ({"loss", "clipped", "entropy", "drift"}, {*JUDGED, *CREDIT, "mismatch"}),
}
CRITIC = {f"critic_{name}" for name in ("loss", "clipped", "value", "grad_norm", "lr")}
UNLIKE = ("time/", "memory/", "tokens_per_second", "mismatch")  # differ between layouts, or are noise
KEYS = {
    "sft": ["optim.lr=1e-3", "evaluate.every=2"],
    "reward": ["optim.lr=1e-3"],
    "dpo": ["optim.lr=1e-3"],
    # The function fails for some responses, so at every layout the same samples must leave the loss.
    "online-dpo": ["rollout.group=4", "dpo.pairs=all", "reward.function={folder}/rules.py:length"],
    "grpo": [
        "rollout.group=4",
        "rollout.temperature=0.7",
        "reward.function={folder}/rules.py:length",
        "evaluate.function={folder}/rules.py:quarter",
    ],
    "rlhf": [
        "reward.function={folder}/rules.py:length",
        "rollout.group=1",
        "batch.minibatches=2",
        "ppo.kl_target=1",
        "ppo.kl_horizon=1000",
        "ppo.reward_scale=true",
    ]
    + ["ppo.critic_warmup=1", "optim.warmup=2", "optim.schedule=linear", "critic.lr=3e-4", "rollout.temperature=1.3"],
}
COMMON = [
    "data.max_tokens=96",
    "batch.prompts=6",
    "batch.tokens=512",
    "optim.lr=1e-4",
    "evaluate.prompts=8",
    "evaluate.show=0",
]
COMMON += [
    "rollout.engine=kvcache",
    "rollout.max_tokens=16",
    f"checkpoint.every={CHECKPOINT}",
    "checkpoint.keep=3",
    f"steps={STEPS}",
]


def configure(folder: Path, mode: str, layout: str, *overrides: str) -> Config:
    kind = mode if mode in ("sft", "reward", "dpo") else "prompts"
    data = [f"data.train={folder}/data/train_{kind}.jsonl", f"data.eval={folder}/data/dev_{kind}.jsonl"]
    load = [f"policy.load={folder}/{'model' if mode == 'sft' else 'sft'}"]
    if kind == "prompts":
        load.append(f"reward.load={folder}/reward")
    keys = [key.format(folder=folder) for key in KEYS.get(mode, [])]
    return configuration.load(
        mode, [*COMMON, *keys, *layout_keys(layout), *data, *load, f"out={folder}/{layout}/{mode}", *overrides]
    )


def train(config: Config, mesh: Mesh, first: int = 0) -> Run:
    """Run all steps from `first` on.

    Check that the engine sleeps in phases of other models, and that each step draws its own samples.
    """
    held_out = config.evaluate.function or rule(config)
    with Rewards(rule(config), config.reward) as rewards, Rewards(held_out, config.reward) as grader:
        run, steps = assembled(config, mesh, rewards, grader), list[int]()
        enter = run.roles.residence.enter

        def watched(phase: Phase, role: str = "policy") -> None:
            """Check that the engine sleeps in phases of other models."""
            enter(phase, role)
            engine = run.source.owner.engine if run.algorithm.online else None
            awake = engine and any(weight.untyped_storage().nbytes() for weight in engine.parameters().values())
            assert not awake or phase in (Phase.PUBLISH, Phase.ROLLOUT), f"the engine is awake in phase {phase}"

        run.roles.residence.enter = watched
        with drawing(steps.append):
            run.train()
    run.metrics.close()
    mesh.barrier()
    assert steps == list(range(first, config.steps)), f"{config.mode} drew the samples of steps {steps}"
    return run


def assembled(config: Config, mesh: Mesh, rewards: Rewards, grader: Rewards) -> Run:
    given = inputs(config, mesh.world)
    return build(config, mesh, given, checked_ledger(config, mesh, given), rewards, grader, Interrupt())


@contextmanager
def drawing(call: Callable[[int], object]) -> Iterator[None]:
    """Call call(step) whenever the samples or prompts of a step are taken from the data."""
    draw = Records.draw

    def noted(self: Records, step: int, count: int, seed: int) -> list[Sample]:
        call(step)
        return draw(self, step, count, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "draw", noted)
        yield


def metrics(folder: Path, name: str = "metrics") -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {row["step"]: {name: value for name, value in row.items() if not name.startswith(UNLIKE)} for row in rows}


def check_step_zero(mode: str, found: dict[int, dict[str, float]]) -> None:
    for step, name, wanted in STEP_ZERO[mode]:
        assert abs(found[step][name] - wanted) < 1e-5, f"{mode}: {name} is {found[step][name]} at step {step}"


def check_rows(config: Config, found: dict[int, dict[str, float]]) -> None:
    """Check the names of the metrics, the steps with an evaluation, and numbers by hand."""
    mode, (loss, drawn), last = config.mode, NAMES[config.mode], found[STEPS]
    held_out = drawn & JUDGED | {"reward/length"} if drawn else loss
    if config.evaluate.function:
        held_out = held_out - {"reward_rule", "reward_score", "reward/length"} | {"reward/quarter"}
    wanted = (
        {"step", "grad_norm", "lr"}
        | loss
        | drawn
        | ({"reward/length"} if drawn else set())
        | {f"eval_{name}" for name in held_out}
        | (CRITIC if mode == "rlhf" else set())
    )
    assert last.keys() == wanted - {"mismatch"}, f"{mode}: {last.keys() ^ wanted}"
    told = [step for step, row in found.items() if any(name.startswith("eval_") for name in row)]
    assert told == ([0, 2, 3] if mode == "sft" else [0, 3]), f"{mode}: held-out numbers at steps {told}"
    if mode in MOVED:
        name, least = MOVED[mode]
        assert abs(last[name]) > least, f"{mode}: {name} is {last[name]}, as if nothing had been learned"
    if mode == "rlhf":
        assert not {"loss", "lr", "grad_norm"} & found[1].keys(), "the critic warms up alone"
        for name, rates in RATES.items():
            assert {step: row[name] for step, row in found.items() if name in row} == pytest.approx(rates, rel=1e-6)
    if config.evaluate.function:
        assert [found[step]["eval_reward"] for step in told] == [0.25] * 2, "the held-out function's"
    if drawn:
        assert sum(row.get("reward_failed", 0.0) for row in found.values()), f"{mode}: no reward has failed"
    for row in found.values():
        for name in [name for name in row if name.endswith("reward_score")]:
            parts = row[name.replace("_score", "_rule")], row[name]
            assert math.isclose(row[name.removesuffix("_score")], sum(parts), abs_tol=1e-5), (
                f"{mode}: reward is not the sum of {parts}"
            )
            assert parts[1] != 0.0
            assert (parts[0] != 0.0) == bool(config.reward.function)


def kept(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((out / "samples").glob("*"))}


def check_samples(config: Config, online: bool) -> None:
    """Check that a step samples with the weights before it, and its evaluation with the weights after it."""
    found = [json.loads(line) for text in kept(Path(config.out)).values() for line in text.splitlines()]
    wanted = {("train", step, step - 1) for step in range(1, STEPS + 1)} | {
        ("evaluate", step, step) for step in (0, STEPS)
    }
    assert {(line["use"], line["step"], *line["versions"]) for line in found} == (wanted if online else set()), (
        config.mode
    )


def check_mismatch(config: Config) -> None:
    """Check that the engine's log-probs equal those of the policy before it learns, at the rollout's temperature."""
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["mismatch"] for row in rows if "mismatch" in row]
    assert len(gaps) == (STEPS if config.mode in ("grpo", "rlhf") else 0)
    assert all(gap < 1e-5 for gap in gaps), f"{config.mode}: mismatch {gaps}"


def check_judge(run: Run) -> None:
    """Check that the score is the reward model's output at the last token, and does not depend on later tokens.

    It is added to the reward of the function.
    """
    if "reward" not in run.roles.learners or "reward" in run.roles.trained:
        return
    samples = run.source.records.head(5)
    longer = [
        replace(s, tokens=np.append(s.tokens, s.tokens[:9]), mask=np.ones(len(s.mask) + 9, bool)) for s in samples
    ]
    wanted = [stream[len(s.mask)] for s, stream in zip(samples, run.roles.read("reward", longer), strict=True)]
    for i, sample in enumerate(samples):
        sample.reward = float(i)
    run.roles.grade(samples)
    assert [s.reward for s in samples] == pytest.approx([i + score for i, score in enumerate(wanted)], abs=1e-5)
    assert np.ptp(wanted) > 0.01
    if run.mesh.rank == 0:  # test_modes.py compares it with transformers
        graded = [[sample.tokens.tolist(), sample.reward - i] for i, sample in enumerate(samples)]
        Path(run.config.out, "graded.json").write_text(json.dumps(graded))


def check_split(folder: Path, mode: str, found: dict[int, dict[str, float]]) -> None:
    """Check that every metric of every step equals that of one rank."""
    wanted = metrics(folder / "tp1" / mode)
    assert found.keys() == wanted.keys()
    for step, row in wanted.items():
        assert found[step].keys() == row.keys(), f"{mode}: {found[step].keys() ^ row.keys()}"
        even = {
            name.replace("margin", "accuracy")
            for name, value in row.items()
            if name.endswith("margin") and abs(value) < 1e-5
        }
        for name, value in row.items():
            if name in even:  # the models are equal up to rounding, so the preferred one is random
                continue
            assert math.isclose(found[step][name], value, rel_tol=1e-3, abs_tol=1e-5), (
                f"{mode} step {step}: {name} {found[step][name]} != {value}"
            )


def check_resume(config: Config, mesh: Mesh, mode: str) -> None:
    """Resume from the checkpoint before the last one: the end is bitwise the same.

    Now everything is offloaded, and each save waits for its files.
    """
    out = Path(config.out)
    before = {path.name: path.read_bytes() for path in (out / f"step_{STEPS:06}").glob("*.safetensors")}
    assert before
    rows, samples = metrics(out), kept(out)
    mesh.barrier()
    if mesh.rank == 0:
        (out / "latest").write_text(f"step_{CHECKPOINT:06}")
    mesh.barrier()
    at_once = replace(config.checkpoint, background=False)
    train(replace(config, memory=Memory(offload="all"), checkpoint=at_once), mesh, first=CHECKPOINT)
    assert metrics(out) == rows, f"{mode}: metrics differ after resuming"
    assert kept(out) == samples, f"{mode}: samples differ after resuming"
    for name, content in before.items():
        assert (out / f"step_{STEPS:06}" / name).read_bytes() == content, f"{mode}: {name} differs after resuming"


def check_mode(folder: Path, mode: str, layout: str, mesh: Mesh) -> None:
    config = configure(folder, mode, layout)
    run = train(config, mesh)
    found = metrics(Path(config.out))
    check_step_zero(mode, found)
    check_rows(config, found)
    check_samples(config, run.algorithm.online)
    check_mismatch(config)
    check_judge(run)
    check_split(folder, mode, found)
    check_resume(config, mesh, f"{mode} at {layout}")


def main() -> None:
    folder = Path(sys.argv[1])
    for layout, _, only in (entry.partition(":") for entry in sys.argv[2:]):
        mesh = Mesh(configure(folder, "sft", layout).parallel, 1)
        for mode in only.split(",") if only else KEYS:
            check_mode(folder, mode, layout, mesh)
        groups.close()
    mesh.barrier()
    if mesh.rank == 0:
        print("modes agree", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
