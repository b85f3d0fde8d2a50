"""The plan of a publish: which rank sends which box to which rank.

Each rank computes its own part without communication, in time that does not grow with the world size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rlhf.weights.tiles import Box, Tile, intersect, numel, subtract


@dataclass(frozen=True, slots=True)
class Move:
    """The transfer of a box from a rank that holds it to a rank that needs it. Both may be the same rank."""

    source: int  # rank
    target: int  # rank
    box: Box
    source_tile: Tile
    target_tile: Tile

    @property
    def numel(self) -> int:
        return numel(self.box)


@dataclass(slots=True)
class Holders:
    """The ranks that hold the same boxes, in ascending order: all of them, and those of each node."""

    ranks: list[int]
    by_node: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


class Plan:
    """Covers each target tile with source tiles. Each box comes from the nearest rank that holds it.

    sources[r] and targets[r] are the tilings of rank r. nodes[r] is the node of rank r. Ranks with equal tilings share
    one list object, as names.tilings() makes them, so each tiling is processed once.

    A rank takes a box from itself if it holds it, else from a rank of its node, else from any rank. Among several
    equally near ranks, the index of the receiving rank selects the sender, so that the load is spread evenly over the
    holders. A box is sent to a target rank at most once, and only if that rank does not hold it. The choice does not
    depend on other ranks. So each rank can compute what it receives, and which few ranks may receive from it.
    """

    def __init__(self, sources: Sequence[Sequence[Tile]], targets: Sequence[Sequence[Tile]], nodes: Sequence[int]):
        self.targets, self.nodes, self.world = targets, nodes, len(nodes)
        self._node: dict[int, list[int]] = defaultdict(list)  # node -> its ranks
        for rank, node in enumerate(nodes):
            self._node[node].append(rank)
        self._place = [self._node[node].index(rank) for rank, node in enumerate(nodes)]  # index of a rank in its node
        # Ranks with the same index in their nodes are neighbours in this order. They hold the same part of their
        # engines and need the same boxes.
        self._order = sorted(range(self.world), key=lambda rank: (self._place[rank], rank))
        self._turn = sorted(range(self.world), key=lambda turn: self._order[turn])
        alike: dict[int, list[int]] = defaultdict(list)  # id of a tiling -> the ranks that have it
        for rank, tiling in enumerate(sources):
            alike[id(tiling)].append(rank)
        self._tiling = [id(tiling) for tiling in sources]
        self._tiles: dict[str, dict[Box, dict[int, Tile]]] = defaultdict(dict)  # name -> box -> id of a tiling -> tile
        for key, ranks in alike.items():
            for tile in sources[ranks[0]]:
                self._tiles[tile.name].setdefault(tile.box, {})[key] = tile
        self._holders: dict[tuple[int, ...], Holders] = {}  # ids of tilings -> the ranks that have one of them
        for keys in {tuple(tiles) for boxes in self._tiles.values() for tiles in boxes.values()}:
            self._holders[keys] = holders = Holders(sorted(rank for key in keys for rank in alike[key]))
            for rank in holders.ranks:
                holders.by_node[nodes[rank]].append(rank)

    def received(self, rank: int) -> list[Move]:
        """Return all moves to a rank, from itself and from other ranks."""
        return list(self._received(rank, self._tiles.keys()))

    def sent(self, rank: int) -> list[Move]:
        """Return all moves from a rank to other ranks, by ascending target, then in the order of received(target)."""
        held = {
            name for name, boxes in self._tiles.items() if any(self._tiling[rank] in tiles for tiles in boxes.values())
        }
        asking = sorted(self._asking(rank) - {rank})
        return [move for other in asking for move in self._received(other, held) if move.source == rank]

    @property
    def moves(self) -> list[Move]:
        """All moves of all ranks, for calculations about the whole world."""
        return [move for rank in range(self.world) for move in self.received(rank)]

    def volume(self) -> tuple[int, int]:
        """Return (number of elements that stay on their rank, number of elements that are sent between ranks)."""
        local = remote = 0
        for move in self.moves:
            if move.source == move.target:
                local += move.numel
            else:
                remote += move.numel
        return local, remote

    def seconds(self, itemsize: int, within: float, between: float) -> float:
        """Return a lower bound on the transfer time in seconds: the time of the busiest rank.

        `within` and `between` are the bytes per second, in each direction, of one rank's links inside its node and to
        other nodes. Both links work at the same time. itemsize: bytes of an element.
        """
        sent: dict[tuple[int, bool, bool], int] = defaultdict(int)  # (rank, out, between nodes) -> elements
        for move in self.moves:
            if move.source != move.target:
                far = self.nodes[move.source] != self.nodes[move.target]
                sent[move.source, True, far] += move.numel
                sent[move.target, False, far] += move.numel
        return max(
            (count * itemsize / (between if far else within) for (_, _, far), count in sent.items()), default=0.0
        )

    def _received(self, rank: int, names: Collection[str]) -> Iterator[Move]:
        """Yield the moves to a rank for the tensors of these names."""
        return (move for tile in self.targets[rank] if tile.name in names for move in self._cover(rank, tile))

    def _cover(self, rank: int, tile: Tile) -> list[Move]:
        boxes = self._tiles[tile.name]
        near = [(self._nearest(rank, tuple(tiles)), box) for box, tiles in boxes.items() if intersect(box, tile.box)]
        moves, missing = [], [tile.box]
        for (_, holder), box in sorted(near, key=lambda found: (found[0][0], found[1])):
            rest: list[Box] = []
            for part in missing:
                common = intersect(part, box)
                if common is None:
                    rest.append(part)
                    continue
                rest += subtract(part, common)
                moves.append(Move(holder, rank, common, boxes[box][self._tiling[holder]], tile))
            missing = rest
        assert not missing, f"no rank holds {tile.name} {missing}, which rank {rank} needs for {tile.local}"
        return moves

    def _nearest(self, rank: int, tilings: tuple[int, ...]) -> tuple[int, int]:
        """Return (distance, rank) of the holder that a rank receives from."""
        holders = self._holders[tilings]
        if self._tiling[rank] in tilings:
            return 0, rank
        near = holders.by_node.get(self.nodes[rank])
        if near:
            return 1, near[self._place[rank] * len(near) // len(self._node[self.nodes[rank]])]
        return 2, holders.ranks[self._turn[rank] % len(holders.ranks)]

    def _asking(self, rank: int) -> set[int]:
        """Return the ranks that may receive from a rank: those of its node, and those whose index selects it."""
        asking = set(self._node[self.nodes[rank]])
        for tilings, holders in self._holders.items():
            if self._tiling[rank] in tilings:
                asking.update(self._order[holders.ranks.index(rank) :: len(holders.ranks)])
        return asking
