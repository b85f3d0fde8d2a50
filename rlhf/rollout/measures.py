"""Metrics of sampled responses, in training and in an evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.contracts import Sample, Sums, Verdict, groups
from rlhf.data.shares import Header
from rlhf.rewards import answers

MATH = "math"  # the name of the math verifier and of its part of a reward
MOST_CATEGORIES = 100  # so that a set with other things under `category`, such as ids, does not fill the metrics
LONGEST = 100  # characters of a category; the rest is cut
UNNAMED, REST = "none", "others"  # categories of records that have none, and of those beyond the limit


class Graded(NamedTuple):
    """A response with its reward, without its tokens."""

    reward: float
    verdict: Verdict
    tokens: int  # that the model has sampled
    truncated: bool


class Outcome(NamedTuple):
    """The responses to one held-out prompt. All ranks know it."""

    group: int  # index of the prompt in its set
    responses: list[Graded]
    majority: float | None  # see majority()


def summary(samples: Sequence[Sample]) -> Sums:
    """Return metrics of samples as (sum, count). Those of rewards leave out samples whose rewards have failed."""
    return _totals([_graded(sample) for sample in samples])


def outcomes(samples: Sequence[Sample], votes: bool) -> list[Outcome]:
    """Return the outcome of each group of samples. votes: the math verifier has graded them, so compute majority()."""
    return [
        Outcome(group[0].group, [_graded(sample) for sample in group], majority(group) if votes else None)
        for group in groups(samples)
    ]


def majority(group: Sequence[Sample]) -> float | None:
    """Return 1.0 if the most frequent answer to a prompt is right, else 0.0. The math verifier has graded the group.

    Two answers are the same if the verifier calls them equal. Of equally frequent answers, the one that comes first in
    the group counts. Responses without an answer do not vote; if there is no answer at all, the result is 0.0. It is
    None if all rewards have failed.
    """
    voters = [sample for sample in group if not sample.verdict.failed]
    known: dict[str, str] = {}  # how an answer is written -> how the first equal answer is written
    votes, right = Counter[str](), dict[str, float]()
    for sample in voters:
        if (said := answers.extract(sample.text.response)) is None:
            continue
        if said not in known:
            known[said] = next((answer for answer in votes if answers.equal(said, answer)), said)
        votes[known[said]] += 1
        right.setdefault(known[said], sample.verdict.parts[MATH])
    if not voters:
        return None
    return right[votes.most_common(1)[0][0]] if votes else 0.0


def pass_at(k: int, tries: int, right: int) -> float:
    """Return the chance that k of `tries` responses, `right` of which are right, contain a right one (2107.03374).

    It is the unbiased estimate of pass@k. Integers of any size make it exact up to the last rounding. k <= tries.
    """
    subsets = math.comb(tries, k)
    return (subsets - math.comb(tries - right, k)) / subsets


def attempts(found: Sequence[Outcome], samples: int) -> list[int]:
    """Return the k of pass@k: the powers of two up to `samples`, and `samples`.

    There are none for one sample per prompt, and unless each reward is 0 (wrong) or 1 (right).
    """
    rewards = {reward for outcome in found for reward in _rewards(outcome)}
    powers = {1 << bit for bit in range(samples.bit_length())}
    return sorted(powers | {samples}) if samples > 1 and rewards and rewards <= {0.0, 1.0} else []


def measured(found: Sequence[Outcome], passes: Sequence[int]) -> Sums:
    """Return metrics of held-out prompts as (sum, count).

    Rewards that have failed are left out. passes: the k of pass@k. Prompts with less than k rewards are left out of it.
    reward_stderr is the standard error of the mean over prompts of each prompt's mean reward.
    """
    rewards = [given for outcome in found if (given := _rewards(outcome))]
    votes = [outcome.majority for outcome in found if outcome.majority is not None]
    sums = _totals([response for outcome in found for response in outcome.responses])
    if len(rewards) > 1:
        spread = np.std([np.mean(given) for given in rewards], ddof=1)
        sums["reward_stderr"] = (float(spread) / math.sqrt(len(rewards)), 1.0)
    for k in passes:
        chances = [pass_at(k, len(given), round(sum(given))) for given in rewards if len(given) >= k]
        sums[f"pass@{k}"] = (sum(chances), float(len(chances)))
    return {**sums, "majority": (sum(votes), float(len(votes)))}


def by_category(found: Sequence[Outcome], kinds: Mapping[int, str], passes: Sequence[int]) -> dict[str, Sums]:
    """Return the main metrics of each category, and its number of prompts. kinds: see categories()."""
    names = ("reward", "reward_stderr", *(f"pass@{k}" for k in passes), "majority")
    sums: dict[str, Sums] = {}
    for kind in dict.fromkeys(kinds.values()):
        part = [outcome for outcome in found if kinds[outcome.group] == kind]
        known = measured(part, passes)
        sums[kind] = {"prompts": (float(len(part)), 1.0), **{name: known[name] for name in names if name in known}}
    return sums


def categories(prompts: Sequence[Sample]) -> dict[int, str]:
    """Return group -> category of held-out records; {} if no record has one.

    Records without a text under `category` have the category UNNAMED. Only the MOST_CATEGORIES most frequent ones are
    told apart. The others are REST.
    """
    said = {prompt.group: prompt.text.record.get("category") for prompt in prompts}
    kinds = {group: _category(kind) for group, kind in said.items()}
    frequent = [kind for kind, _ in Counter(kinds.values()).most_common(MOST_CATEGORIES)]
    if frequent in ([], [UNNAMED]):
        return {}
    return {group: kind if kind in frequent else REST for group, kind in kinds.items()}


def _category(kind: object) -> str:
    """Return a category as part of a metric's name. Runs of white space become a space, and control characters "?"."""
    text = " ".join(kind.split()) if isinstance(kind, str) else ""
    return "".join(character if character.isprintable() else "?" for character in text[:LONGEST].rstrip()) or UNNAMED


def by_set(samples: Sequence[Sample], names: Collection[str], measure: Callable[[list[Sample]], Sums]) -> Sums:
    """Return metrics of the samples of each data set: its share of the groups, and what `measure` returns.

    A single data set has none, because they would be those of all samples.
    """
    sums: Sums = {}
    for name in names if len(names) > 1 else ():
        own = [sample for sample in samples if sample.text.set == name]
        found = {"share": (float(len(groups(own))), float(len(groups(samples)))), **measure(own)}
        sums |= {f"set/{name}/{metric}": pair for metric, pair in found.items()}
    return sums


def lengths(samples: Sequence[Sample]) -> Sums:
    """Return the number of response tokens of samples as (sum, count)."""
    return {"response_tokens": (float(sum(s.mask.sum() for s in samples)), float(len(samples)))}


def ages(known: Sequence[Header], step: int, max_lag: int) -> Sums:
    """Return the share of tokens by the age, in steps, of the weights that sampled them, and the highest age."""
    tokens = Counter[int]()  # age -> number of tokens
    for header in known:
        tokens.update({step - version: count for version, count in header.versions.items()})
    shares = {f"lag/{lag}": (float(tokens[lag]), float(tokens.total())) for lag in range(max_lag + 1)}
    return {**shares, "lag_max": (float(max(tokens)), 1.0)}


def _graded(sample: Sample) -> Graded:
    return Graded(sample.reward, sample.verdict, int(sample.mask.sum()), sample.truncated)


def _rewards(outcome: Outcome) -> list[float]:
    """Return the rewards of a prompt's responses that have not failed."""
    return [response.reward for response in outcome.responses if not response.verdict.failed]


def _totals(responses: Sequence[Graded]) -> Sums:
    n, good = float(len(responses)), [response for response in responses if not response.verdict.failed]
    both = [(r.verdict.rule, r.verdict.score) for r in good if r.verdict.score is not None]  # with a reward model
    parts: dict[str, list[float]] = {}
    for response in good:
        for name, value in response.verdict.parts.items():
            parts.setdefault(f"reward/{name}", []).append(value)
    return {
        "reward_rule": (sum(rule for rule, _ in both), float(len(both))),
        "reward_score": (sum(score for _, score in both), float(len(both))),
        "reward": (sum(response.reward for response in good), float(len(good))),
        **{name: (sum(values), float(len(values))) for name, values in parts.items()},
        "response_tokens": (float(sum(response.tokens for response in responses)), n),
        "truncated": (float(sum(response.truncated for response in responses)), n),
        "reward_failed": (float(sum(response.verdict.failed for response in responses)), n),
    }
