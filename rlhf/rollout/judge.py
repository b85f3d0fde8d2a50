"""The interface of a judge, which gives responses their rewards, and a judge that runs a reward function."""

from __future__ import annotations

import textwrap
from typing import Protocol

from rlhf.contracts import Sample, Verdict
from rlhf.metrics import say
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Pool, Rewards


class Judge(Protocol):
    """Gives responses their rewards while other responses are still being generated."""

    def give(self, sample: Sample) -> None:
        """Start to compute the reward of a response."""
        ...

    def collect(self, block: bool = False) -> None:
        """Write the finished rewards and verdicts into their samples. With block, wait for all of them."""
        ...


class Rule:
    """A judge that runs a reward function. Its reward is added to the reward of the environment."""

    def __init__(self, rewards: Rewards, mesh: Mesh):
        self.rewards, self.warn = rewards, Warnings(rewards, mesh, "reward")
        self._given: list[Sample] = []

    def give(self, sample: Sample) -> None:
        if self.rewards.spec:  # without a function, the reward comes from a reward model or an environment alone
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
    """Prints the first failure and the first timeout of the user's code on each node. Metrics count all failures."""

    def __init__(self, pool: Pool, mesh: Mesh, what: str):
        self.pool, self.mesh, self.what = pool, mesh, what
        self.failed = self.late = False

    def __call__(self) -> None:
        if self.pool.failure and not self.failed and self.mesh.is_first_on_node:
            reason = textwrap.indent(self.pool.failure, "    ")
            say(f"the code of the {self.what} failed: the reward is 0 (see reward_failed in metrics.jsonl)\n{reason}")
        if self.pool.late and not self.late and self.mesh.is_first_on_node:
            limit = f"reward.timeout={self.pool.timeout:g}"
            say(f"the {self.what} took longer than {limit}: timeouts depend on the load, so another run may differ")
        self.failed, self.late = bool(self.pool.failure), self.pool.late
