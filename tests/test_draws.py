"""The requests of the source to an engine, and the samples that it makes of the completions.

The engine of these tests records all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from graders import FREE, Grading
from meshes import ALONE
from rows import write

from rlhf import configuration
from rlhf.contracts import Completion, Request, Sample, Sampling, Verdict, groups
from rlhf.data.records import Records
from rlhf.data.tokenizer import Tokenizer
from rlhf.errors import RewardError
from rlhf.rollout.measures import summary
from rlhf.rollout.source import EngineSource

KEYS = ["data.max_tokens=64", "rollout.max_tokens=4", "rollout.group=3", "batch.prompts=4"]


class Asked(NamedTuple):
    """One call of an engine."""

    prompts: list[tuple[int, ...]]
    sampling: Sampling
    seeds: list[int]


class Scribe:
    """An engine that answers each prompt with the result of `says` for its seed."""

    withdraw = list  # all requests are complete before a withdrawal

    def __init__(self, says: Callable[[int], Completion]):
        self.says, self.asked, self.version, self.order = says, list[Asked](), 3, 1

    def stream(self, requests: list[Request]) -> Iterator[list[tuple[int, Completion]]]:
        prompts, seeds = [tuple(request.prompt) for request in requests], [request.seed for request in requests]
        self.asked.append(Asked(prompts, requests[0].sampling, seeds))
        for request in requests[:: self.order]:
            yield [(request.key, self.says(request.seed))]


def worthless(samples: list[Sample]) -> None:
    for sample in samples:
        sample.reward = 0.0


def by_sibling(samples: list[Sample]) -> None:
    """Give reward 1 to the first response of each group, and 0 to the others."""
    worthless(samples)
    for group in groups(samples):
        group[0].reward = 1.0


@pytest.fixture
def build(tmp_path: Path, llama2: Tokenizer) -> Callable[..., tuple[EngineSource, Scribe]]:
    """Return build(*overrides, says=..., reward=...), which makes a source over 20 records, and its engine."""
    path = write(tmp_path / "train.jsonl", *({"prompt": f"What is {n}?", "answer": str(n)} for n in range(20)))

    def made(
        *overrides: str, says: Callable[[int], Completion] | None = None, reward: Callable = worthless
    ) -> tuple[EngineSource, Scribe]:
        config = configuration.load("grpo", [*KEYS, *overrides])
        engine = Scribe(says or (lambda seed: Completion([5 + seed % 50, llama2.eos], [-0.5, -0.25], "stop")))
        records = Records.load(path, "prompts", llama2, config.data, max_prompt=60)
        return EngineSource(config, ALONE, engine, llama2, records, Grading(reward), 64), engine  # type: ignore[arg-type]

    return made


def test_every_draw_has_a_seed_of_its_own(build) -> None:
    """A seed depends on the run's seed, the step, the prompt's index in it, and the response's index in its group."""
    source, engine = build()
    prompts = source.records.head(4)
    for step in (3, 4, 3):
        source.sample(prompts, source.sampler.sampling(), 3, step, FREE)
    other, others = build("seed=2")
    other.sample(prompts, other.sampler.sampling(), 3, 3, FREE)
    third, fourth, again, another = (call.seeds for call in (*engine.asked, *others.asked))
    assert third == again
    assert len({*third, *fourth, *another}) == 3 * 12
    assert engine.asked[0].prompts == [tuple(p.tokens.tolist()) for p in prompts for _ in range(3)]
    source.sample([prompts[2]], source.sampler.sampling(), 2, 3, FREE)
    assert engine.asked[3].seeds == third[6:8], "whoever is drawn beside it"


def test_one_prompt_in_two_groups_of_a_step(build) -> None:
    """A batch may be larger than the data set. The second draw of a prompt has other seeds."""
    source, engine = build("batch.prompts=40")
    samples, _ = source.take(0)
    (asked,) = engine.asked
    assert len(set(asked.prompts)) == 20
    assert len(set(asked.seeds)) == 120
    assert sorted({s.group for s in samples}) == list(range(40))


def test_a_step_has_its_own_prompts(build) -> None:
    """They are those that the records return for (step, seed)."""
    source, engine = build("seed=5")
    for step in range(5):
        samples, sums = source.take(step)
        wanted = [tuple(prompt.tokens.tolist()) for prompt in source.records.draw(step, 4, 5)]
        assert engine.asked[step].prompts == [prompt for prompt in wanted for _ in range(3)]
        assert [s.group for s in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert sums.keys() == {"time/reward"}
    assert len({prompt for asked in engine.asked for prompt in asked.prompts}) == 20, "an epoch"
    assert len({seed for asked in engine.asked for seed in asked.seeds}) == 5 * 12


def test_rounds_ask_new_prompts(build) -> None:
    """The first round is that of a run with a single round.

    Each further round has other prompts and seeds. All depend on the step.
    """
    source, engine = build("rollout.rounds=3")
    samples, sums = source.take(1)
    assert (sums["rounds"], sums["groups_kept"]) == ((3.0, 1.0), (0.0, 12.0))
    assert [s.group for s in samples] == sorted([8, 9, 10, 11] * 3), "the last round's, where nothing is kept"
    first, second, third = engine.asked
    assert first.prompts[::3] == [tuple(prompt.tokens.tolist()) for prompt in source.records.draw(1, 4, 1)]
    assert len({tuple(asked.prompts) for asked in engine.asked}) == 3
    assert len({*first.seeds, *second.seeds, *third.seeds}) == 36
    source.take(2)
    assert not {*engine.asked[1].seeds} & {*engine.asked[4].seeds}
    assert engine.asked[1].prompts != engine.asked[4].prompts


def test_rounds_end_when_there_are_enough(build) -> None:
    """Groups of unequal rewards are kept until there are batch.prompts of them. Further groups are dropped."""
    turns = []

    def reward(samples: list[Sample]) -> None:  # three groups of unequal rewards per round
        turns.append(len(turns))
        by_sibling(samples)
        groups(samples)[turns[-1] % 4][0].reward = 0.0

    source, engine = build("rollout.rounds=5", reward=reward)
    samples, sums = source.take(0)
    assert len(engine.asked) == 2
    assert (sums["rounds"], sums["groups_kept"]) == ((2.0, 1.0), (6.0, 8.0))
    kept = groups(samples)
    assert [group[0].group for group in kept] == [1, 2, 3, 4]
    assert all([s.reward for s in group] == [1.0, 0.0, 0.0] for group in kept)


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("length", [2, 4])
def test_the_engine_says_whether_a_response_was_cut(build, finish: str, length: int) -> None:
    """The length does not show it.

    A stop token may be the last allowed token, and the limit of the whole text may cut a response earlier.
    """
    source, _ = build(says=lambda seed: Completion([9] * length, [-1.0] * length, finish))
    samples, _ = source.take(0)
    assert all(s.truncated == (finish == "length") for s in samples)
    assert summary(samples)["truncated"] == (12.0 * (finish == "length"), 12.0)
    assert summary(samples)["response_tokens"] == (12.0 * length, 12.0)


def test_a_stop_string_ends_a_response_that_the_limit_cut(build, llama2: Tokenizer) -> None:
    tokens = llama2.encode("a b c", continues=True)
    source, _ = build('rollout.stop=["b"]', says=lambda seed: Completion(tokens, [-1.0] * len(tokens), "length"))
    samples, _ = source.take(0)
    assert not any(s.truncated for s in samples)
    assert all(len(s.tokens) - s.mask.argmax() - 1 < len(tokens) for s in samples)


@pytest.mark.parametrize(
    ("keys", "reported"), [([], True), (["rollout.top_p=0.9"], False), (["rollout.top_k=5"], False)], ids=str
)
def test_only_comparable_log_probs_are_compared(build, keys: list[str], reported: bool) -> None:
    """With a filter, the engine's log-probs are those of another distribution than the learner's."""
    source, _ = build(*keys)
    samples, _ = source.take(0)
    assert "mismatch" not in source.describe(samples), "the policy has not scored them"
    for s in samples:
        s.old_logp = s.sampler_logp - 0.5
    assert source.describe(samples).get("mismatch", (0.0, 0.0))[0] == pytest.approx(
        0.5 * sum(s.mask.sum() for s in samples) * reported
    )


def test_each_purpose_has_its_way_to_sample(build, llama2: Tokenizer) -> None:
    """Training uses the keys of rollout, held-out prompts evaluate.temperature, and a probe the learner's temperature.

    Held-out prompts and probes use neither top_p nor top_k.
    """
    keys = [
        "rollout.temperature=0.7",
        "rollout.top_p=0.9",
        "rollout.top_k=11",
        "rollout.max_tokens=20",
        "evaluate.temperature=0.3",
    ]
    source, engine = build(*keys)
    source.take(0)
    source.answer(source.records.head(2), FREE)
    source.answer(source.records.head(2), FREE)
    source.probe(source.records.head(2))
    train, held_out, again, probe = (asked.sampling for asked in engine.asked)
    assert train == Sampling(max_tokens=20, temperature=0.7, top_p=0.9, top_k=11, stop_ids=llama2.stop_ids)
    assert held_out == again == Sampling(max_tokens=20, temperature=0.3, top_p=1.0, top_k=0, stop_ids=llama2.stop_ids)
    assert probe == Sampling(max_tokens=8, temperature=0.7, top_p=1.0, top_k=0, stop_ids=llama2.stop_ids)
    assert engine.asked[1] == engine.asked[2], "every evaluation draws alike"
    assert [len(asked.prompts) for asked in engine.asked] == [12, 2, 2, 2]
    short, engine = build("rollout.max_tokens=3")
    short.probe(short.records.head(1))
    assert engine.asked[0].sampling.max_tokens == 3


def test_who_rewards(build) -> None:
    """The source's reward grades training samples, and the given grader held-out ones. Probes get no reward."""
    source, _ = build(reward=by_sibling)

    def grader(samples: list[Sample]) -> None:
        for sample in samples:
            sample.reward, sample.verdict = 7.0, Verdict(rule=7.0)

    assert {s.reward for s in source.take(0)[0]} == {0.0, 1.0}
    graded = source.answer(source.records.head(2), Grading(grader))
    assert [s.reward for s in graded] == [7.0, 7.0]
    assert summary(graded) | {"reward": (14.0, 2.0), "reward_failed": (0.0, 2.0)} == summary(graded)
    assert [s.reward for s in source.probe(source.records.head(2))] == [0.0, 0.0]


def test_failed_rewards_leave_their_groups(build) -> None:
    """Rounds keep groups whose remaining rewards are unequal. Means are those of the remaining rewards."""

    def reward(samples: list[Sample]) -> None:
        by_sibling(samples)
        for index, group in enumerate(groups(samples)):
            for sample in group[: index % 4]:  # the first group keeps its three rewards, the others 0, 0 and none
                sample.reward, sample.verdict = 0.0, Verdict(failed=True)
        for sample in samples:
            sample.verdict = replace(sample.verdict, parts={} if sample.verdict.failed else {"math": sample.reward})

    source, _ = build("rollout.rounds=3", reward=reward)
    samples, sums = source.take(0)
    assert sums["groups_kept"] == (3.0, 12.0)
    assert [s.reward for s in samples] == [1.0, 0.0, 0.0] * 3
    samples, _ = build("reward.max_failed=0.5", reward=reward)[0].take(0)
    found = summary(samples)
    assert found["reward"] == found["reward/math"] == (1.0, 6.0)
    assert (found["reward_failed"], found["response_tokens"][1]) == ((6.0, 12.0), 12.0)
    assert source.describe(samples).keys() == found.keys()


def test_too_many_failed_rewards_end_the_run(build, capsys: pytest.CaptureFixture[str]) -> None:
    """The share over all ranks counts, in a step and in an evaluation. The first traceback is shown."""

    def reward(samples: list[Sample]) -> None:
        for sample in samples[1:]:
            sample.verdict = Verdict(failed=True)

    source, _ = build("reward.max_failed=0.9", reward=reward)
    source.grader.failure = "Traceback:\n  a line\nValueError: no key\n"
    wanted = (
        "11 of 12 rewards of step 3 failed, and reward.max_failed=0.9; the first error, shown above, was: ValueError"
    )
    with pytest.raises(RewardError, match=wanted) as error:
        source.take(2)
    assert error.value.code == 1
    assert capsys.readouterr().out == "    Traceback:\n      a line\n    ValueError: no key\n"
    assert len(source.answer(source.records.head(2), source.grader)) == 2
    source, _ = build("reward.max_failed=0.4", reward=reward)
    prompts = [replace(prompt, text=replace(prompt.text, set="dev")) for prompt in source.records.head(2)]
    with pytest.raises(RewardError, match="1 of 2 rewards of the evaluation on dev failed"):
        source.answer(prompts, source.grader)


def test_log_probs_stand_on_their_labels(build) -> None:
    source, _ = build(says=lambda seed: Completion([7, 8, 9], [-1.0, -2.0, -3.0], "stop"))
    for sample in source.take(0)[0]:
        prompt = len(sample.tokens) - 3
        assert sample.tokens[prompt:].tolist() == [7, 8, 9]
        assert sample.sampler_logp.tolist() == [0.0] * (prompt - 1) + [-1.0, -2.0, -3.0]
        assert np.array_equal(sample.mask, sample.sampler_logp < 0)
        assert sample.version.tolist() == [-1] * (prompt - 1) + [3, 3, 3]


def test_responses_are_complete_in_any_order(build) -> None:
    """The samples do not depend on the order. The grader gets each response as soon as it is complete."""
    source, engine = build(
        says=lambda seed: Completion([5 + seed % 50] * (1 + seed % 3), [-0.5] * (1 + seed % 3), "stop")
    )
    given = []
    source.grader = Grading(lambda samples: given.append(len(samples)))
    wanted = [(s.group, s.tokens.tolist()) for s in source.take(0)[0]]
    engine.order = -1
    assert [(s.group, s.tokens.tolist()) for s in source.take(0)[0]] == wanted
    assert given == [12, 12]
