"""What must be on the device in which phase of a step: the one table behind residence (what moves) and ledger (what fits)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

ENGINE, POLICY = "engine", "policy"


class Phase(StrEnum):
    """What the device is used for."""

    ROLLOUT = "rollout"  # the engine samples
    PUBLISH = "publish"  # the engine receives the policy's weights
    SCORE = "score"  # a role's forward passes
    LEARN = "learn"  # a role's updates
    SAVE = "save"  # a role's state goes into a checkpoint


class Kind(StrEnum):
    """What a role or the engine keeps in memory."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    CACHE = "cache"  # keys and values of the engine, and what else it needs to generate


@dataclass(frozen=True, slots=True, order=True)
class Tenant:
    """Everything of one kind that belongs to one role, or to the engine. It moves as a whole."""

    role: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.role}.{self.kind}"


# Kinds of the role that is visited, and of the engine.
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
    """A phase of a role. The engine's phases, rollout and publish, are the policy's."""

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
