"""The training loop without models: samples of each update, learning rates, and scores.

Roles and metrics only record their arguments. Only made() builds a Run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from meshes import ALONE

from rlhf import configuration
from rlhf import roles as models
from rlhf.algorithms import ALGORITHMS
from rlhf.config import Config
from rlhf.contracts import Sample, Verdict
from rlhf.errors import RewardError, UserError
from rlhf.loop import Run, due
from rlhf.parallel.mesh import Mesh

GROUPS, SIBLINGS = 12, 2
FOLDERS = ["policy.load=p", "reward.load=r"]


class Update(NamedTuple):
    """One call of Roles.learn()."""

    role: str
    samples: list[tuple[int, int]]  # (group, index of the response in the group)
    lr: float


class Roles:
    """Models that record their samples, and return the name of their role as a stream."""

    NAMES = ("policy", "critic", "reference")
    hidden = 64

    def __init__(self, trained: list[str]):
        self.trained, self.updates, self.visits = trained, list[Update](), list[str]()

    def visit(self, phase: str) -> Iterator[tuple[str, None]]:
        for name in self.trained:
            self.visits.append(f"{phase} {name}")
            yield name, None

    def learn(
        self, name: str, samples: Sequence[Sample], loss: Callable, whole_groups: bool, lr: float
    ) -> dict[str, tuple[float, float]]:
        self.updates.append(Update(name, [(s.group, int(s.reward)) for s in samples], lr))
        return {"lr": (lr, 1.0)}

    def check(self, name: str) -> None:
        pass

    def read(self, name: str, samples: Sequence[Sample]) -> list[np.ndarray]:
        return [np.full(len(s.mask), self.NAMES.index(name), np.float32) for s in samples]


class Metrics:
    """Metrics that write nothing."""

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        pass


def made(config: Config) -> tuple[Run, Roles]:
    """Return a run that can learn, without a device."""
    run: Any = object.__new__(Run)
    run.config, run.algorithm, run.metrics, run.mesh = config, ALGORITHMS[config.mode](config), Metrics(), ALONE
    run.roles = Roles([name for name, use in run.algorithm.models.items() if use == "train"])
    return run, run.roles


def samples(groups: int = GROUPS, siblings: int = SIBLINGS) -> list[Sample]:
    """Return samples of groups. Group numbers have gaps, as after dropped groups.

    The reward is the index in the group.
    """
    tokens, mask = np.arange(4, dtype=np.int32), np.ones(3, bool)
    return [Sample(tokens, mask, group=3 * g, reward=float(k)) for g in range(groups) for k in range(siblings)]


def learned(
    mode: str, *overrides: str, steps: Sequence[int] = (0,), given: list[Sample] | None = None
) -> list[list[Update]]:
    """Return the updates of each step."""
    run, roles = made(configuration.load(mode, [*FOLDERS, *overrides]))
    found = []
    for step in steps:
        roles.updates = []
        run.learn(samples() if given is None else given, step)
        found.append(roles.updates)
    return found


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 4), (2, 5)])
def test_every_pass_sees_every_sample_once(epochs: int, minibatches: int) -> None:
    """The pass has `minibatches` updates of equally many groups, or one less. Each group is in one of them."""
    (updates,) = learned("grpo", f"batch.epochs={epochs}", f"batch.minibatches={minibatches}")
    assert len(updates) == epochs * minibatches
    everything = [(s.group, int(s.reward)) for s in samples()]
    for epoch in range(epochs):
        batches = [update.samples for update in updates[epoch * minibatches :][:minibatches]]
        assert sorted(pair for batch in batches for pair in batch) == everything
        assert len({group for batch in batches for group in {g for g, _ in batch}}) == GROUPS
        sizes = [len({group for group, _ in batch}) for batch in batches]
        assert sum(sizes) == GROUPS
        assert max(sizes) - min(sizes) <= 1
        assert all(batch == sorted(batch) for batch in batches)


def test_minibatches_are_drawn_anew() -> None:
    """The order differs between passes, steps and seeds. It is the same for the same ones."""
    keys = ["batch.epochs=3", "batch.minibatches=3"]

    def passes(*overrides: str) -> list[tuple]:
        updates = [u for found in learned("grpo", *keys, *overrides, steps=(0, 1)) for u in found]
        parts = [frozenset(group for group, _ in u.samples) for u in updates]
        return [tuple(parts[i : i + 3]) for i in range(0, len(parts), 3)]

    drawn = passes()
    assert len({frozenset(parts) for parts in drawn}) == 6
    assert drawn == passes()
    assert not set(drawn) & set(passes("seed=2"))
    in_order = [frozenset(3 * g for g in part) for part in np.array_split(np.arange(GROUPS), 3)]
    assert all(set(parts) != set(in_order) for parts in drawn)


def rates(updates: list[Update], role: str) -> list[float]:
    return [update.lr for update in updates if update.role == role]


def test_the_schedule_ends_with_the_last_update() -> None:
    """There are steps x epochs x minibatches updates. After the last one the rate is min_lr.

    The numbers are by hand.
    """
    keys = [
        "optim.lr=1",
        "optim.min_lr=0.2",
        "optim.schedule=linear",
        "steps=3",
        "batch.epochs=2",
        "batch.minibatches=2",
        "optim.warmup=2",
    ]
    found = [rates(updates, "policy") for updates in learned("grpo", *keys, steps=range(3))]
    assert found[0] == pytest.approx([0.5, 1.0, 1.0, 0.92])
    assert found[1] == pytest.approx([0.84, 0.76, 0.68, 0.6])
    assert found[2] == pytest.approx([0.52, 0.44, 0.36, 0.28])


def test_the_critic_warms_up_alone() -> None:
    """For ppo.critic_warmup steps the policy is not trained.

    Then its schedule begins, and it ends at the same step as the critic's.
    """
    keys = [
        "optim.lr=1",
        "optim.schedule=linear",
        "optim.warmup=2",
        "steps=4",
        "batch.minibatches=2",
        "ppo.critic_warmup=2",
        "critic.lr=3",
    ]
    updates = learned("rlhf", *keys, steps=range(4))
    assert [rates(step, "policy") for step in updates[:2]] == [[], []]
    assert rates(updates[2], "policy") + rates(updates[3], "policy") == pytest.approx([0.5, 1.0, 1.0, 0.5])
    critic = [lr for step in updates for lr in rates(step, "critic")]
    assert critic == pytest.approx([1.5, 3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5])
    assert [update.role for update in updates[2]] == ["policy", "policy", "critic", "critic"], (
        "one role after the other"
    )


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    """It is critic.lr, or optim.lr if that is 0. It applies to no other role."""
    for keys, wanted in ((["critic.lr=3"], 3.0), ([], 1.0)):
        (updates,) = learned("rlhf", "optim.lr=1", *keys)
        assert rates(updates, "policy") == [1.0]
        assert rates(updates, "critic") == [wanted]
    for mode in ("sft", "reward", "dpo"):
        (updates,) = learned(mode, "optim.lr=1", "critic.lr=3")
        assert [update.lr for update in updates] == [1.0]


def test_few_groups() -> None:
    """Mini-batches without groups cause no updates, and a step without samples trains no role.

    The schedule still counts them.
    """
    keys = ["optim.lr=1", "optim.schedule=linear", "steps=2", "batch.minibatches=4"]
    few, none = learned("online-dpo", *keys, given=samples(3)), learned("online-dpo", *keys, given=[])
    assert [len({group for group, _ in update.samples}) for update in few[0]] == [1, 1, 1]
    assert rates(few[0], "policy") == pytest.approx([1.0, 0.875, 0.75])
    assert none == [[]]
    run, roles = made(configuration.load("online-dpo", [*FOLDERS, *keys]))
    run.learn([], 0)
    assert roles.visits == [], "nothing is moved to the device"


@pytest.mark.parametrize("mode", ["grpo", "rlhf", "online-dpo"])
def test_failed_rewards_leave_score_credit_and_loss(mode: str) -> None:
    """The advantages are those of a step without these samples. If all have failed, nothing is learned."""
    given = samples(4, siblings=3)
    for index, sample in enumerate(given):  # equal texts make no pair
        sample.tokens = sample.tokens + index
    for sample in (*given[:1], *given[3:5], *given[6:9]):  # groups of two, one, no and three responses are left
        sample.reward, sample.verdict = 100.0, Verdict(failed=True)

    def step(drawn: list[Sample]) -> tuple[Roles, list[Sample]]:
        run, roles = made(configuration.load(mode, [*FOLDERS, "optim.lr=1"]))
        scored: list[list[Sample]] = []
        source: Any = Mock(take=lambda step: (drawn, {}))
        metrics: Any = Mock(time=lambda _: nullcontext())
        run.source, run.metrics = source, metrics
        roles.score = partial(models.Roles.score, roles)  # type: ignore[attr-defined]
        roles.grade, roles.subject = scored.append, "policy"  # type: ignore[attr-defined]
        roles.learners = {"policy": Mock()}  # type: ignore[attr-defined]
        assert run.step(0, check=False) == sum(len(s.tokens) for s in drawn)
        metrics.keep.assert_called_once_with("train", drawn)
        source.describe.assert_called_once_with(drawn)
        return roles, scored[0]

    roles, scored = step(given)
    good = [s for s in given if not s.verdict.failed]
    assert scored == good
    wanted, _ = step([replace(s) for s in good])
    assert roles.updates == wanted.updates
    assert {member for update in roles.updates for member in update.samples} == {
        "grpo": {(0, 1), (0, 2), (9, 0), (9, 1), (9, 2)},
        "rlhf": {(0, 1), (0, 2), (3, 2), (9, 0), (9, 1), (9, 2)},
        "online-dpo": {(0, 1), (0, 2), (9, 0), (9, 2)},
    }[mode]
    roles, scored = step([replace(s, verdict=Verdict(failed=True)) for s in given])
    assert (roles.updates, roles.visits, scored) == ([], [], [])


@pytest.mark.parametrize(
    ("mode", "speakers"),
    [
        ("sft", {}),
        ("reward", {}),
        ("dpo", {"ref_logp": "reference"}),
        ("rlhf", {"old_logp": "policy", "ref_logp": "reference", "values": "critic"}),
    ],
)
def test_who_scores_what(mode: str, speakers: dict[str, str]) -> None:
    run, roles = made(configuration.load(mode, FOLDERS))
    scored = samples()
    models.Roles.score(roles, scored, run.algorithm.streams)  # type: ignore[arg-type]
    for stream in ("old_logp", "ref_logp", "values"):
        for sample in scored:
            found = getattr(sample, stream)
            if stream in speakers:
                assert found.tolist() == [roles.NAMES.index(speakers[stream])] * 3
            else:
                assert found is None


@pytest.mark.parametrize("mode", ALGORITHMS)
def test_a_model_of_no_numbers_is_refused_in_every_role(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """This holds for every mode, and for any rank. tests/test_ruin.py has whole runs."""
    config = configuration.load(mode, FOLDERS)
    uses = ALGORITHMS[mode](config).models | {"reward": "frozen"}
    found: Any = {name: SimpleNamespace(use=use, folder=f"folder of the {name}") for name, use in uses.items()}
    mesh: Any = SimpleNamespace(world=1, all_gather=lambda mine: [mine])
    mesh.agree = partial(Mesh.agree, mesh)
    for bad in found:
        spoilt = found[bad].folder
        monkeypatch.setattr(
            models.Roles,
            "_learner",
            lambda _, role, spoilt=spoilt: SimpleNamespace(sound=lambda: role.folder != spoilt),
        )
        with pytest.raises(UserError, match=f"^folder of the {bad}: its weights are not finite"):
            models.Roles(config, mesh, found, torch.float32, 1.0, SimpleNamespace(add=lambda *_: None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ruined", "said"),
    [
        ("weights", "the policy's weights or its optimizer's state are no longer finite"),
        ("stream", "the policy's outputs for this step's samples are no longer finite"),
        ("state", "the state of rlhf is no longer finite"),
    ],
)
def test_what_is_ruined_is_not_saved(ruined: str, said: str) -> None:
    """Weights, optimizer state, outputs and the algorithm's state are checked, on all ranks."""
    run, roles = made(configuration.load("rlhf", FOLDERS))
    learner = SimpleNamespace(sound=lambda optimizer: ruined != "weights")
    roles.visit = lambda phase: iter([("policy", learner)])  # type: ignore[method-assign, assignment, return-value]
    if ruined == "stream":
        roles.read = lambda name, samples: [np.array([0.0, np.nan])]  # type: ignore[method-assign]
    roles.mesh = SimpleNamespace(all_gather=lambda mine: [True, mine])  # type: ignore[attr-defined]
    roles.check_all = partial(models.Roles.check_all, roles)  # type: ignore[attr-defined]
    run.algorithm.state.update({"kl": np.nan if ruined == "state" else 0.0})
    run.probe = samples()[:2]
    with pytest.raises(FloatingPointError, match=said):
        run.save(1)


def test_what_happens_every_so_many_steps() -> None:
    assert [done for done in range(1, 8) if due(done, 3, 7)] == [3, 6, 7]
    assert [done for done in range(1, 8) if due(done, 0, 7)] == [7]
    assert [done for done in range(1, 8) if due(done, 1, 7)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_checkpoint_is_complete_when_failed_rewards_end_the_run() -> None:
    def fail(step: int) -> None:
        raise RewardError("3 of 4 rewards failed")

    settled: list[bool] = []
    run: Any = SimpleNamespace(config=configuration.load("grpo", FOLDERS), metrics=None, start=2, evaluation=None)
    run.offer, run.whole_step = lambda version, check: None, fail
    run.checkpoints = SimpleNamespace(settle=lambda wait: settled.append(wait))
    with pytest.raises(RewardError):
        Run.train(run)
    assert settled == [True]


@pytest.mark.parametrize(("signal", "ended"), [(None, True), (4, False), (5, True)])
def test_a_run_ends_when_its_files_are_written(signal: int | None, ended: bool) -> None:
    """A signal stops the run after its step. train() returns whether all steps are done, also if none was left."""
    for start in (3, 5):
        calls: list[object] = []
        run: Any = SimpleNamespace(
            config=configuration.load("sft", [*FOLDERS, "steps=5"]),
            metrics=None,
            start=start,
            evaluation=None,
            offer=lambda version, check: None,
            whole_step=lambda step, calls=calls: calls.append(step) or step + 1 == signal,
            checkpoints=SimpleNamespace(settle=lambda wait, calls=calls: calls.append(wait)),
        )
        assert Run.train(run) == (ended or start == 5)
        assert calls == [*(step for step in range(start, 5) if not signal or step < signal), True]
