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
    logp: list[float] = field(default_factory=list)  # the engine's, of each token; 0 of those of an environment
    version: list[int] = field(default_factory=list)  # of the weights that drew each token; -1: an environment has said it
    finish: str = ""  # "stop" or "length" once it is complete
    turns: list[dict[str, str]] = field(default_factory=list)  # role and content, where there is an environment
    earned: float = 0.0  # what the environment has given for the turns
    failed: bool = False  # the environment has failed
    sample: Sample | None = None  # once it is complete, on the rank that has it rewarded

    def extend(self, drawn: Completion, version: int) -> None:
        """Add what weights of this version have drawn."""
        self.tokens += drawn.tokens
        self.logp += drawn.logp
        self.version += [version] * len(drawn.tokens)
        self.finish = "" if drawn.finish == "held" else drawn.finish

    @property
    def turn(self) -> list[int]:
        """The tokens behind the last that an environment has said."""
        return self.tokens[next((n for n in range(len(self.version), 0, -1) if self.version[n - 1] < 0), 0) :]

    def cut(self, tokens: int) -> None:
        """Drop all but the first so many tokens of this turn."""
        end = len(self.tokens) - len(self.turn) + tokens
        self.tokens, self.logp, self.version = self.tokens[:end], self.logp[:end], self.version[:end]

    def observe(self, tokens: list[int]) -> None:
        """Add what nobody has drawn and nobody learns."""
        self.tokens += tokens
        self.logp += [0.0] * len(tokens)
        self.version += [-1] * len(tokens)

    def fail(self) -> None:
        """End it, worth nothing."""
        self.finish, self.earned, self.failed = "stop", 0.0, True

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint, with what a complete one was found to be worth."""
        drawn = {"tokens": torch.tensor(self.tokens, dtype=torch.int32), "logp": torch.tensor(self.logp, dtype=torch.float64)}
        told = {"finish": self.finish, "turns": self.turns, "earned": self.earned, "failed": self.failed}
        judged = {"reward": self.sample.reward, **asdict(self.sample.verdict)} if self.sample else {}
        return {**drawn, "version": torch.tensor(self.version, dtype=torch.int32), **told, **judged}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Response:
        """What state() gave, without the sample."""
        drawn = (state[name].tolist() for name in ("tokens", "logp", "version"))
        return cls(*drawn, *(state[name] for name in ("finish", "turns", "earned", "failed")))


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
