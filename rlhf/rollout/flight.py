"""Responses in flight: how far each one is, and which groups a step may take.

A response may be drawn by the weights of several steps. Between steps no engine holds it: it is its tokens, and goes on as a longer prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rlhf.contracts import Completion, Sample


@dataclass(slots=True)
class Response:
    """What has been drawn so far in answer to a prompt."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # the engine's, of each token
    version: list[int] = field(default_factory=list)  # of the weights that drew each token
    finish: str = ""  # "stop" or "length" once it is complete
    sample: Sample | None = None  # once it is complete, on the rank that has it rewarded

    def extend(self, drawn: Completion, version: int) -> None:
        """Add what weights of this version have drawn."""
        self.tokens += drawn.tokens
        self.logp += drawn.logp
        self.version += [version] * len(drawn.tokens)
        self.finish = "" if drawn.finish == "held" else drawn.finish

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint, with what a complete one was found to be worth."""
        drawn = {"tokens": torch.tensor(self.tokens, dtype=torch.int32), "logp": torch.tensor(self.logp, dtype=torch.float64)}
        judged = {"reward": self.sample.reward, **asdict(self.sample.verdict)} if self.sample else {}
        return {**drawn, "version": torch.tensor(self.version, dtype=torch.int32), "finish": self.finish, **judged}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Response:
        """What state() gave, without the sample."""
        return cls(state["tokens"].tolist(), state["logp"].tolist(), state["version"].tolist(), state["finish"])


@dataclass(slots=True, eq=False)
class Group:
    """A prompt with the responses to it. Equal to itself alone."""

    prompt: Sample
    key: tuple[int, int]  # decides its draws: batch of the data's order, place in the batch
    begun: int  # step in which its responses were begun
    responses: list[Response]

    @property
    def complete(self) -> bool:
        return all(response.finish for response in self.responses)


def choose(groups: Sequence[Group], quota: int, step: int, max_lag: int) -> list[Group]:
    """The oldest `quota` complete groups, which a step takes; empty while it has to wait.

    groups are in the order in which they were drawn. No group is taken more than max_lag steps after the one in which it was begun. A step
    takes `quota` of them, so the j-th oldest that is left over may have to wait until j // quota + 1 steps from now. Where that is too
    late for any, this step waits for older ones.
    """
    chosen = [group for group in groups if group.complete][:quota]
    taken = set(chosen)
    left = [group for group in groups if group not in taken]
    late = any(step + 1 + j // quota > group.begun + max_lag for j, group in enumerate(left))
    return [] if late or len(chosen) < quota else chosen
