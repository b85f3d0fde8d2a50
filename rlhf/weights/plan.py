"""Who sends which box to whom. Every rank works out its own part alone, in time that does not grow with the world."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rlhf.weights.tiles import Box, Tile, intersect, numel, subtract


@dataclass(frozen=True, slots=True)
class Move:
    """A box that one rank holds and another, or the same one, needs."""

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
    """The ranks that hold the same boxes, all of them and by node, in ascending order."""

    ranks: list[int]
    by_node: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


class Plan:
    """Covers every target tile with source tiles, each box from the nearest rank that holds it.

    sources[r] and targets[r] are the tilings of rank r, nodes[r] the node it runs on. Ranks with the same tiling share one list, as
    names.tilings() makes them: it is then looked at once.

    The same rank comes first, then the same node, then any. Of several that are as near, a rank takes one by its own place, so that the
    ranks which ask are spread evenly over those that hold. A byte crosses at most once per target rank, and only if that rank does not
    hold it. Nothing depends on what other ranks take. So a rank knows what it receives, and which few ranks may ask it.
    """

    def __init__(self, sources: Sequence[Sequence[Tile]], targets: Sequence[Sequence[Tile]], nodes: Sequence[int]):
        self.targets, self.nodes, self.world = targets, nodes, len(nodes)
        self._node: dict[int, list[int]] = defaultdict(list)  # node -> its ranks
        for rank, node in enumerate(nodes):
            self._node[node].append(rank)
        self._place = [self._node[node].index(rank) for rank, node in enumerate(nodes)]  # of a rank in its node
        # Ranks of one place, which have the same part of their engines, follow one another: they ask for the same boxes.
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
        """All that a rank needs, from itself and from others."""
        return list(self._received(rank, self._tiles.keys()))

    def sent(self, rank: int) -> list[Move]:
        """All that others need from a rank, by target in ascending order; to each in the order of what it receives."""
        held = {name for name, boxes in self._tiles.items() if any(self._tiling[rank] in tiles for tiles in boxes.values())}
        asking = sorted(self._asking(rank) - {rank})
        return [move for other in asking for move in self._received(other, held) if move.source == rank]

    @property
    def moves(self) -> list[Move]:
        """All moves of all ranks: for arithmetic about a whole world."""
        return [move for rank in range(self.world) for move in self.received(rank)]

    def volume(self) -> tuple[int, int]:
        """(elements that stay on their rank, elements that cross ranks)."""
        local = remote = 0
        for move in self.moves:
            if move.source == move.target:
                local += move.numel
            else:
                remote += move.numel
        return local, remote

    def seconds(self, itemsize: int, within: float, between: float) -> float:
        """How long the transfers take at least: those of the busiest rank, at the rates (bytes/s, each way) of one rank's links within
        its node and between nodes, which work at the same time. itemsize is the bytes of an element."""
        sent: dict[tuple[int, bool, bool], int] = defaultdict(int)  # (rank, out, between nodes) -> elements
        for move in self.moves:
            if move.source != move.target:
                far = self.nodes[move.source] != self.nodes[move.target]
                sent[move.source, True, far] += move.numel
                sent[move.target, False, far] += move.numel
        return max((count * itemsize / (between if far else within) for (_, _, far), count in sent.items()), default=0.0)

    def _received(self, rank: int, names: Collection[str]) -> Iterator[Move]:
        """What a rank needs of these tensors."""
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
        """(distance, rank) of the holder that a rank takes from."""
        holders = self._holders[tilings]
        if self._tiling[rank] in tilings:
            return 0, rank
        near = holders.by_node.get(self.nodes[rank])
        if near:
            return 1, near[self._place[rank] * len(near) // len(self._node[self.nodes[rank]])]
        return 2, holders.ranks[self._turn[rank] % len(holders.ranks)]

    def _asking(self, rank: int) -> set[int]:
        """The ranks that may take something from a rank: those of its node, and those whose place leads to it."""
        asking = set(self._node[self.nodes[rank]])
        for tilings, holders in self._holders.items():
            if self._tiling[rank] in tilings:
                asking.update(self._order[holders.ranks.index(rank) :: len(holders.ranks)])
        return asking
