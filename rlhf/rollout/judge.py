"""Who says what responses are worth: the protocol, and a reward function that runs in processes of its own."""

from __future__ import annotations

import textwrap
from typing import Protocol

from rlhf.contracts import Sample, Verdict
from rlhf.metrics import say
from rlhf.parallel.mesh import Mesh
from rlhf.rewards import Rewards


class Judge(Protocol):
    """Says what responses are worth, while others are still being generated."""

    def give(self, sample: Sample) -> None:
        """Take up a response."""
        ...

    def collect(self, block: bool = False) -> None:
        """Write reward and verdict into the responses that are judged by now; with block, into all that were given."""
        ...


class Rule:
    """A reward function as a judge. The first failure on each node is shown; all are counted."""

    def __init__(self, rewards: Rewards, mesh: Mesh):
        self.rewards, self.mesh = rewards, mesh
        self._given: list[Sample] = []

    def give(self, sample: Sample) -> None:
        if self.rewards.spec:  # without, the reward model alone judges
            self.rewards.give(len(self._given), (sample.text.prompt, sample.text.response, dict(sample.text.record)))
            self._given.append(sample)

    def collect(self, block: bool = False) -> None:
        silent, in_time = (not known and self.mesh.is_first_on_node for known in (self.rewards.failure, self.rewards.late))
        for key, score in self.rewards.take(block).items():
            self._given[key].reward, self._given[key].verdict = score.value, Verdict(rule=score.value, failed=score.failed)
        if silent and self.rewards.failure:
            reason = textwrap.indent(self.rewards.failure, "    ")
            say(f"a reward failed and counts as 0 (see reward_failed in metrics.jsonl):\n{reason}")
        if in_time and self.rewards.late:
            say(f"a reward took longer than reward.timeout={self.rewards.timeout:g}: another run may differ from this one")
        if block:
            self._given = []
