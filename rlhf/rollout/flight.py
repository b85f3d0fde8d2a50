"""Groups in flight, which are begun but not yet used by a step, and the choice of the groups that a step uses.

A response may contain tokens of the weights of several steps. Between steps, engines hold no requests. To continue a
response, its prompt and its tokens so far become the prompt of a new request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rlhf.contracts import Completion, Sample


@dataclass(slots=True)
class Response:
    """A response to a prompt, complete or not."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # the engine's log-prob of each token; 0: token of an environment
    version: list[int] = field(default_factory=list)  # of the weights that sampled each token; -1: of an environment
    finish: str = ""  # "stop" or "length" when the response is complete
    turns: list[dict[str, str]] = field(default_factory=list)  # role and content; empty without an environment
    earned: float = 0.0  # sum of the environment's rewards for the turns
    failed: bool = False  # the environment has failed
    sample: Sample | None = None  # set when the response is complete, on the rank that gives it to the grader

    def extend(self, drawn: Completion, version: int) -> None:
        """Add tokens that weights of this version have sampled."""
        self.tokens += drawn.tokens
        self.logp += drawn.logp
        self.version += [version] * len(drawn.tokens)
        self.finish = "" if drawn.finish == "held" else drawn.finish

    @property
    def turn(self) -> list[int]:
        """Return the tokens after the last token of an environment."""
        return self.tokens[next((n for n in range(len(self.version), 0, -1) if self.version[n - 1] < 0), 0) :]

    def cut(self, tokens: int) -> None:
        """Keep only the first `tokens` tokens of the current turn."""
        end = len(self.tokens) - len(self.turn) + tokens
        self.tokens, self.logp, self.version = self.tokens[:end], self.logp[:end], self.version[:end]

    def observe(self, tokens: list[int]) -> None:
        """Add tokens of an environment. They are not learned."""
        self.tokens += tokens
        self.logp += [0.0] * len(tokens)
        self.version += [-1] * len(tokens)

    def fail(self) -> None:
        """End the response without a reward, because its environment has failed."""
        self.finish, self.earned, self.failed = "stop", 0.0, True

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. It includes the reward and the verdict of a complete response."""
        drawn = {
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "logp": torch.tensor(self.logp, dtype=torch.float64),
        }
        told = {"finish": self.finish, "turns": self.turns, "earned": self.earned, "failed": self.failed}
        graded = {"reward": self.sample.reward, **asdict(self.sample.verdict)} if self.sample else {}
        return {**drawn, "version": torch.tensor(self.version, dtype=torch.int32), **told, **graded}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Response:
        """Return the response of a saved state(), without its sample."""
        drawn = (state[name].tolist() for name in ("tokens", "logp", "version"))
        return cls(*drawn, *(state[name] for name in ("finish", "turns", "earned", "failed")))


@dataclass(slots=True, eq=False)
class Group:
    """A prompt with its responses. Groups are compared by identity."""

    prompt: Sample
    key: tuple[int, int]  # (batch in the order of the data, index in that batch); part of the responses' seeds
    begun: int  # step in which its responses were begun
    responses: list[Response]

    @property
    def complete(self) -> bool:
        return all(response.finish for response in self.responses)


def choose(groups: Sequence[Group], quota: int, step: int, max_lag: int) -> list[Group]:
    """Return the oldest `quota` complete groups for this step to use, or [] if the step must wait for more responses.

    `groups` is ordered from old to new. A group must be used at most max_lag steps after the step that began it. Each
    step uses `quota` groups. So the group at index j of the remaining ones may have to wait j // quota + 1 steps. If
    that is too late for any group, this step must wait until older groups are complete.
    """
    chosen = [group for group in groups if group.complete][:quota]
    taken = set(chosen)
    left = [group for group in groups if group not in taken]
    late = any(step + 1 + j // quota > group.begun + max_lag for j, group in enumerate(left))
    return [] if late or len(chosen) < quota else chosen
