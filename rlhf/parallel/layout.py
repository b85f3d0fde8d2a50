"""The order of the ranks of a run, and the places of ranks. Only this file states the order. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

Axis = tuple[int, int]  # (rank, size) along one axis of parallelism


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a model that a rank holds, along each axis that splits weights."""

    tp: Axis = (0, 1)
    pp: Axis = (0, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """The number of ranks on each axis. The product is the world size."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Return the (tp, cp, dp, pp) ranks of a world rank.

        The tensor-parallel rank changes fastest and the pipeline stage slowest: megatron-core's order tp-cp-dp-pp.
        """
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        return tp, cp, rest % self.dp, rest // self.dp

    def place(self, rank: int) -> Place:
        """Return the place of a world rank."""
        tp, _, _, pp = self.coordinates(rank)
        return Place((tp, self.tp), (pp, self.pp))

    def replicas(self) -> list[list[int]]:
        """Return the world ranks of each data-parallel replica, in ascending order."""
        found: list[list[int]] = [[] for _ in range(self.dp)]
        for rank in range(self.world):
            found[self.coordinates(rank)[2]].append(rank)
        return found


def spread(world: int, tp: int, pp: int = 1) -> Layout:
    """Return the layout of models over `world` ranks: as many data-parallel replicas as fit.

    Engines (rollout.tp) are such replicas: each has tp consecutive ranks.
    """
    assert world % (tp * pp) == 0, f"{world} ranks do not divide over tp {tp} x pp {pp}"
    return Layout(tp=tp, pp=pp, dp=world // (tp * pp))
