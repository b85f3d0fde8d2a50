"""The phases of a step, and what each needs on the device. rlhf.residence and rlhf.ledger both use this table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ENGINE, POLICY = "engine", "policy"


class Phase(StrEnum):
    """What the device is used for."""

    ROLLOUT = "rollout"  # the engine generates
    PUBLISH = "publish"  # the engine receives the policy's weights
    SCORE = "score"  # forward passes of a role
    LEARN = "learn"  # updates of a role
    SAVE = "save"  # the state of a role is written to a checkpoint


class Kind(StrEnum):
    """What a role or the engine has in device memory."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    CACHE = "cache"  # KV cache of the engine, and its other buffers for generation


@dataclass(frozen=True, slots=True, order=True)
class Tenant:
    """All tensors of one kind that belong to one role or to the engine. They are moved together."""

    role: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.role}.{self.kind}"


# phase -> (kinds of the role in this phase, kinds of the engine)
NEEDS: dict[Phase, tuple[tuple[Kind, ...], tuple[Kind, ...]]] = {
    Phase.ROLLOUT: ((), (Kind.WEIGHTS, Kind.CACHE)),
    Phase.PUBLISH: ((Kind.WEIGHTS,), (Kind.WEIGHTS,)),
    Phase.SCORE: ((Kind.WEIGHTS,), ()),
    Phase.LEARN: ((Kind.WEIGHTS, Kind.GRADIENTS, Kind.OPTIMIZER), ()),
    Phase.SAVE: ((Kind.WEIGHTS, Kind.OPTIMIZER), ()),
}
TENANTS = {"train": NEEDS[Phase.LEARN][0], "frozen": NEEDS[Phase.SCORE][0]}  # use of a role -> the kinds it has


@dataclass(frozen=True, slots=True)
class Visit:
    """A phase of a role. The role of the engine's phases, rollout and publish, is the policy."""

    phase: Phase
    role: str = POLICY

    @property
    def needs(self) -> frozenset[Tenant]:
        """The tenants that must be on the device."""
        role, engine = NEEDS[self.phase]
        return frozenset([Tenant(self.role, kind) for kind in role] + [Tenant(ENGINE, kind) for kind in engine])

    @property
    def is_engines(self) -> bool:
        return bool(NEEDS[self.phase][1])

    def __str__(self) -> str:
        return str(self.phase) if self.is_engines else f"{self.phase}/{self.role}"
