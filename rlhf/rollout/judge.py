"""Who says what responses are worth: the protocol, and a reward function that runs in processes of its own."""

from __future__ import annotations

import textwrap
from typing import Protocol

from rlhf.contracts import Sample, Verdict
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
