"""What responses are found to be worth while others are still being generated, and what a step's samples look like."""

from __future__ import annotations

import textwrap
from typing import Protocol

import numpy as np

from rlhf.contracts import Sample, Sums, Verdict
from rlhf.metrics import say
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Pool, Rewards


class Judge(Protocol):
    """Says what responses are worth, while others are still being generated."""

    def give(self, sample: Sample) -> None:
        """Take up a response."""
        ...

    def collect(self, block: bool = False) -> None:
        """Write reward and verdict into the responses that are judged by now; with block, into all that were given."""
        ...


class Rule:
    """A reward function as a judge: what it says is added to what an environment has."""

    def __init__(self, rewards: Rewards, mesh: Mesh):
        self.rewards, self.warn = rewards, Warnings(rewards, mesh, "reward")
        self._given: list[Sample] = []

    def give(self, sample: Sample) -> None:
        if self.rewards.spec:  # without, a reward model or an environment alone judges
            self.rewards.give(len(self._given), (sample.text.prompt, sample.text.response, dict(sample.text.record)))
            self._given.append(sample)

    def collect(self, block: bool = False) -> None:
        for key, score in self.rewards.take(block).items():
            sample, before = self._given[key], self._given[key].verdict
            sample.verdict = Verdict(rule=before.rule + score.value, failed=before.failed or score.failed)
            sample.reward = sample.verdict.rule
        self.warn()
        if block:
            self._given = []


class Warnings:
    """Shows the first failure of the user's code on each node, and says once that it was late. All failures are counted."""

    def __init__(self, pool: Pool, mesh: Mesh, what: str):
        self.pool, self.mesh, self.what = pool, mesh, what
        self.failed = self.late = False

    def __call__(self) -> None:
        if self.pool.failure and not self.failed and self.mesh.is_first_on_node:
            reason = textwrap.indent(self.pool.failure, "    ")
            say(f"the code of the {self.what} failed, which counts as 0 (see reward_failed in metrics.jsonl):\n{reason}")
        if self.pool.late and not self.late and self.mesh.is_first_on_node:
            say(f"the {self.what} took longer than reward.timeout={self.pool.timeout:g}: another run may differ from this one")
        self.failed, self.late = bool(self.pool.failure), self.pool.late


def summary(samples: list[Sample]) -> Sums:
    """What a step's samples look like, as (sum, count)."""
    n = float(len(samples))
    both = [(s.verdict.rule, s.verdict.score) for s in samples if s.verdict.score is not None]  # those that a reward model scored, too
    return {
        "reward_rule": (sum(rule for rule, _ in both), float(len(both))),
        "reward_score": (sum(score for _, score in both), float(len(both))),
        "reward": (sum(s.reward for s in samples), n),
        "response_tokens": (float(sum(s.mask.sum() for s in samples)), n),
        "truncated": (float(sum(s.truncated for s in samples)), n),
        "reward_failed": (float(sum(s.verdict.failed for s in samples)), n),
    }


def ages(samples: list[Sample], step: int, max_lag: int) -> Sums:
    """How many steps old the weights were that drew what a step learns from: the share of tokens of each age, and the highest age."""
    lags = np.concatenate([step - s.version[s.mask] for s in samples])
    shares = {f"lag/{lag}": (float((lags == lag).sum()), float(len(lags))) for lag in range(max_lag + 1)}
    return {**shares, "lag_max": (float(lags.max()), 1.0)}
