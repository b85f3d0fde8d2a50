"""Metrics of an evaluation: pass@k, majority, the standard error, and categories."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from rlhf.contracts import Sample, Text, Verdict
from rlhf.rollout.measures import attempts, by_category, categories, majority, measured, outcomes, pass_at


def answered(group: int, *said: tuple[str, float] | None) -> list[Sample]:
    """Return the graded responses to a prompt. None: its reward has failed."""
    tokens, mask = np.arange(3, dtype=np.int32), np.array([False, True])
    return [
        Sample(
            tokens,
            mask,
            group,
            reward=each[1] if each else 0.0,
            text=Text(response=f"The answer is {each[0]}." if each and each[0] else "I do not know."),
            verdict=Verdict(rule=each[1], parts={"math": each[1]}) if each else Verdict(failed=True),
        )
        for each in said
    ]


def about(*kinds: object) -> list[Sample]:
    """Return prompts with these values under `category`. `...`: the key is missing."""
    tokens, mask = np.arange(2, dtype=np.int32), np.zeros(1, bool)
    return [
        Sample(tokens, mask, group, text=Text(record={} if kind is ... else {"category": kind}))
        for group, kind in enumerate(kinds)
    ]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response() -> None:
    """Every subset of k responses is enumerated."""
    for tries in range(1, 8):
        for right, k in itertools.product(range(tries + 1), range(1, tries + 1)):
            subsets = list(itertools.combinations([True] * right + [False] * (tries - right), k))
            wanted = Fraction(sum(map(any, subsets)), len(subsets))
            assert pass_at(k, tries, right) == pytest.approx(float(wanted), abs=1e-15)
    assert pass_at(1000, 5000, 1) == 0.2
    assert pass_at(1, 10**6, 1) == 1e-6, "not 1 - 0.999999, which rounds"


@pytest.mark.parametrize(
    ("samples", "rewards", "wanted"),
    [
        (1, [0.0, 1.0], []),
        (2, [0.0, 1.0], [1, 2]),
        (6, [1.0], [1, 2, 4, 6]),
        (8, [0.0], [1, 2, 4, 8]),
        (8, [0.0, 0.5], []),
        (8, [-1.0, 1.0], []),
        (8, [], []),
    ],
)
def test_pass_at_k_needs_rewards_that_are_0_or_1(samples: int, rewards: list[float], wanted: list[int]) -> None:
    """It needs several samples, too. Failed rewards do not matter."""
    found = outcomes(answered(0, *((str(reward), reward) for reward in rewards), None), votes=False)
    assert attempts(found, samples) == wanted


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ([("4", 1.0), ("5", 0.0), ("4", 1.0)], 1.0),
        ([("4", 1.0), ("5", 0.0), ("5", 0.0)], 0.0),
        ([("1/2", 1.0), ("3", 0.0), ("3", 0.0), ("0.5", 1.0), (r"\frac{2}{4}", 1.0)], 1.0),  # equal answers
        ([("5", 0.0), ("4", 1.0)], 0.0),  # the first of equally frequent answers
        ([("4", 1.0), ("5", 0.0), ("5", 0.0), ("4", 1.0)], 1.0),
        ([("", 0.0), ("", 0.0), ("4", 1.0)], 1.0),  # no answer, no vote
        ([("", 0.0), ("", 0.0)], 0.0),
        ([None, None, ("4", 1.0)], 1.0),
        ([None, None], None),
    ],
)
def test_majority(said: list[tuple[str, float] | None], wanted: float | None) -> None:
    assert majority(answered(0, *said)) == wanted


def test_failed_rewards_make_fewer_samples() -> None:
    """Their prompt has n-1 responses. Prompts with less than k are left out of pass@k, and those without any of all."""
    right, wrong = ("4", 1.0), ("5", 0.0)
    drawn = answered(0, right, wrong, wrong, wrong), answered(1, None, right, wrong, None), answered(2, *[None] * 4)
    found = outcomes([sample for group in drawn for sample in group], votes=True)
    sums = measured(found, attempts(found, 4))
    assert sums["reward"] == (2.0, 6.0)
    assert sums["reward_failed"] == (6.0, 12.0)
    assert sums["pass@1"] == (pytest.approx(1 / 4 + 1 / 2), 2.0)
    assert sums["pass@2"] == (pytest.approx(1 / 2 + 1), 2.0)
    assert sums["pass@4"] == (1.0, 1.0), "of the first prompt only"
    assert sums["majority"] == (1.0, 2.0)
    assert sums["reward_stderr"] == (pytest.approx(np.std([0.25, 0.5], ddof=1) / math.sqrt(2)), 1.0)
    assert "reward_stderr" not in measured(found[:1], []), "one prompt has no spread"
    assert measured(outcomes(drawn[0], votes=False), [])["majority"] == (0, 0.0)


def test_categories_are_texts() -> None:
    """White space is made equal. Everything that is not a text is the category none."""
    assert categories(about("a", "b\n  c ", "a", 7, None, ["a"], " ", ...)) == dict(
        enumerate(["a", "b c", "a", "none", "none", "none", "none", "none"])
    )
    assert categories(about(..., 7)) == categories([]) == {}
    odd = {
        0: "?x",
        1: "?[1mred é",
        2: ("long " * 20).rstrip(),
    }  # half of a surrogate pair cannot be written, ESC reaches terminals
    assert categories(about("\ud800x", "\x1b[1mred\xa0é", "long " * 999)) == odd


def test_of_very_many_categories_the_most_frequent_are_told_apart() -> None:
    kinds = categories(about(*(f"id {n}" for n in range(150)), "id 149", "id 148"))
    assert len(set(kinds.values())) == 101
    assert {kinds[149], kinds[148], kinds[0], kinds[97]} == {"id 149", "id 148", "id 0", "id 97"}
    assert kinds[98] == kinds[147] == "others"
    assert len(set(categories(about(*map(str, range(100)))).values())) == 100


def test_metrics_of_categories() -> None:
    """They are those of a set with only the prompts of the category."""
    drawn = answered(0, ("4", 1.0), ("4", 1.0)), answered(1, ("5", 0.0), ("4", 1.0)), answered(2, ("5", 0.0), None)
    parts = [outcomes(group, votes=True) for group in drawn]
    found = [outcome for part in parts for outcome in part]
    kinds = categories(about("a", "b", "a"))
    wanted = measured([found[0], found[2]], [1, 2])
    names = ("reward", "reward_stderr", "pass@1", "pass@2", "majority")
    result = by_category(found, kinds, [1, 2])
    assert result["a"] == {"prompts": (2.0, 1.0), **{name: wanted[name] for name in names}}
    assert (result["b"]["prompts"], result["b"]["pass@1"]) == ((1.0, 1.0), (0.5, 1.0))
    assert list(result) == ["a", "b"]
    assert by_category(found, {}, [1, 2]) == {}
