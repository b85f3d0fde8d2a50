"""Metrics of sampled responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from rlhf.contracts import Sample, Sums, groups, rewarded
from rlhf.data.shares import Header


def summary(samples: list[Sample]) -> Sums:
    """Return metrics of samples as (sum, count). Those of rewards leave out samples whose rewards have failed."""
    n, good = float(len(samples)), rewarded(samples)
    both = [(s.verdict.rule, s.verdict.score) for s in good if s.verdict.score is not None]  # with a reward model
    parts: dict[str, list[float]] = {}
    for sample in good:
        for name, value in sample.verdict.parts.items():
            parts.setdefault(f"reward/{name}", []).append(value)
    return {
        "reward_rule": (sum(rule for rule, _ in both), float(len(both))),
        "reward_score": (sum(score for _, score in both), float(len(both))),
        "reward": (sum(s.reward for s in good), float(len(good))),
        **{name: (sum(values), float(len(values))) for name, values in parts.items()},
        **lengths(samples),
        "truncated": (float(sum(s.truncated for s in samples)), n),
        "reward_failed": (float(sum(s.verdict.failed for s in samples)), n),
    }


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
