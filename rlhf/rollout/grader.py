"""The interface of a grader, which gives responses their rewards, and a grader that runs a reward function."""

from __future__ import annotations

import textwrap
from typing import Protocol

from rlhf.contracts import Sample, Verdict
from rlhf.output import say
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Pool, Rewards


class Grader(Protocol):
    """Gives responses their rewards while other responses are still being generated."""

    @property
    def failure(self) -> str:
        """The first error of a reward that failed; "" if none has failed."""
        ...

    def give(self, sample: Sample) -> None:
        """Start to compute the reward of a response."""
        ...

    def collect(self, block: bool = False) -> None:
        """Write the finished rewards and verdicts into their samples. With block, wait for all of them."""
        ...


class Rule:
    """A grader that runs reward functions. Their reward is added to the reward of the environment."""

    def __init__(self, rewards: Rewards, mesh: Mesh):
        self.rewards, self.mesh, self.warn = rewards, mesh, Warnings(rewards, mesh, "reward")
        self._given: list[Sample] = []
        self._noted = False

    def give(self, sample: Sample) -> None:
        # Without a function, the reward comes from a reward model or an environment alone.
        if self.rewards.specs and not sample.verdict.failed:
            self.rewards.give(len(self._given), (sample.text.prompt, sample.text.response, dict(sample.text.record)))
            self._given.append(sample)

    def collect(self, block: bool = False) -> None:
        for key, score in self.rewards.take(block).items():
            sample, before = self._given[key], self._given[key].verdict
            sample.verdict = Verdict(before.rule + score.value, parts=score.parts, failed=score.failed)
            sample.reward = sample.verdict.rule
        self.warn()
        if block:
            self._given = []
            self._note_unused()

    @property
    def failure(self) -> str:
        return self.rewards.failure

    def _note_unused(self) -> None:
        """Print the weights that fit no part of the first rewards. They may be misspelt."""
        if self.rewards.names and not self._noted:
            self._noted = True
            for name in self.rewards.unused if self.mesh.rank == 0 else ():
                known = ", ".join(sorted(self.rewards.names))
                source = ", ".join(self.rewards.specs)
                say(f"note: reward.weights.{name} fits no part of the first rewards of {source}, which are {known}")


class Warnings:
    """Prints the first failure and the first timeout of the user's code on each rank. Metrics count all failures.

    Only the first rank of a node prints the whole traceback.
    """

    def __init__(self, pool: Pool, mesh: Mesh, what: str):
        self.pool, self.mesh, self.what = pool, mesh, what
        self.failed, self.late = False, ""

    def __call__(self) -> None:
        rank = f"rank {self.mesh.rank}: "
        if self.pool.failure and not self.failed:
            trace = self.pool.failure.rstrip()
            reason = textwrap.indent(trace if self.mesh.is_first_on_node else trace.splitlines()[-1], "    ")
            left = "such responses have no reward (metric reward_failed)"
            say(f"{rank}the {self.what} failed: {left}\n{reason}")
        if self.pool.late and not self.late:
            late = f"the {self.what} took longer than {self.pool.late}"
            say(f"{rank}{late}: timeouts depend on the load, so another run may differ")
        self.failed, self.late = bool(self.pool.failure), self.pool.late
