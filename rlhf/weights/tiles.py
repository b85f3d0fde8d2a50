"""The algebra of weight formats: every format is a tiling of the same Hugging Face tensors.

Each Hugging Face tensor has one canonical view that all layouts share: q, k and v projections are [kv_heads, rows of one
kv head's group, hidden] (biases without hidden), everything else keeps its own shape. A box is a range per dimension of
that view; a tile says where a box lives on one rank. Converting, loading, saving and resharding are all: intersect two
tilings, move the boxes. No torch here: view() only calls methods of the tensor it is given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[tuple[int, int], ...]  # (low, high) per dimension of the canonical view
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # (size, strides, offset) of a part of a contiguous tensor, in elements


@dataclass(frozen=True, slots=True)
class Tile:
    """This box of that Hugging Face tensor lives at this place of that local tensor."""

    name: str  # the Hugging Face tensor
    box: Box
    local: str  # the local tensor that holds it
    start: int  # rows start : start + rows of the local tensor,
    rows: int
    shape: tuple[int, ...]  # seen with this shape,
    at: tuple[int, ...]  # hold the box from these offsets on


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


@dataclass(frozen=True, slots=True)
class Plan:
    """All moves of all ranks, in the same order on every rank."""

    moves: list[Move]

    def volume(self) -> tuple[int, int]:
        """(elements that stay on their rank, elements that cross ranks)."""
        local = sum(move.numel for move in self.moves if move.source == move.target)
        return local, sum(move.numel for move in self.moves) - local

    def seconds(self, nodes: Sequence[int], itemsize: int, within: float, between: float) -> float:
        """How long the transfers take at least: those of the busiest rank, at the rates (bytes/s, each way) of one rank's links within
        its node and between nodes, which work at the same time. nodes[r] is the node of rank r, itemsize the bytes of an element."""
        sent: dict[tuple[int, bool, bool], int] = defaultdict(int)  # (rank, out, between nodes) -> elements
        for move in self.moves:
            if move.source != move.target:
                far = nodes[move.source] != nodes[move.target]
                sent[move.source, True, far] += move.numel
                sent[move.target, False, far] += move.numel
        return max((count * itemsize / (between if far else within) for (_, _, far), count in sent.items()), default=0.0)


def by_local(tiling: Sequence[Tile]) -> dict[str, list[Tile]]:
    """The tiles of each local tensor, by its name."""
    found: dict[str, list[Tile]] = {}
    for tile in tiling:
        found.setdefault(tile.local, []).append(tile)
    return found


def numel(box: Box) -> int:
    return prod(high - low for low, high in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The box that a and b share, or None."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(low < high for low, high in common) else None


def subtract(box: Box, hole: Box) -> list[Box]:
    """Disjoint boxes that cover box without hole, which lies inside it."""
    rest = []
    for dim, ((low, high), (first, last)) in enumerate(zip(box, hole, strict=True)):
        for side in ((low, first), (last, high)):
            if side[0] < side[1]:
                rest.append(hole[:dim] + (side,) + box[dim + 1 :])
    return rest


def split(box: Box, limit: int) -> list[Box]:
    """box in pieces of at most limit elements, cut along the outermost dimension that can be cut."""
    if numel(box) <= limit:
        return [box]
    dim = next(dim for dim, (low, high) in enumerate(box) if high - low > 1)
    low, high = box[dim]
    middle = (low + high) // 2
    halves = (box[:dim] + (side,) + box[dim + 1 :] for side in ((low, middle), (middle, high)))
    return [piece for half in halves for piece in split(half, limit)]


def geometry(tile: Tile, box: Box) -> Geometry:
    """Where box, a part of tile.box, lies in the local tensor, whose elements are contiguous."""
    stride, strides = 1, []
    for size in reversed(tile.shape):
        strides.append(stride)
        stride *= size
    strides.reverse()
    offset = tile.start * (stride // tile.rows)
    for step, at, (origin, _), (low, _) in zip(strides, tile.at, tile.box, box, strict=True):
        offset += step * (at + low - origin)
    return tuple(high - low for low, high in box), tuple(strides), offset


def view(tensor: Tensor, tile: Tile, box: Box) -> Tensor:
    """The part of the local tensor that holds box, a part of tile.box: strided, never a copy."""
    return shaped(tensor, geometry(tile, box))


def shaped(tensor: Tensor, place: Geometry) -> Tensor:
    """The part of a contiguous tensor at some place of it."""
    assert tensor.is_contiguous(), f"a local tensor of shape {tuple(tensor.shape)} is not contiguous"
    size, strides, offset = place
    return tensor.as_strided(size, strides, tensor.storage_offset() + offset)


def plan(sources: Sequence[Sequence[Tile]], targets: Sequence[Sequence[Tile]], nodes: Sequence[int]) -> Plan:
    """Cover every target tile with source tiles, each box from the nearest rank that holds it.

    sources[r] and targets[r] are the tilings of rank r, nodes[r] the node it runs on. The same rank comes first, then the
    same node, then whoever has sent least so far. A byte crosses at most once per target rank, and only if that rank does
    not hold it. A pure function: every rank computes the same plan without communication.
    """
    held: dict[str, dict[Box, dict[int, Tile]]] = defaultdict(dict)  # name -> box -> rank -> tile
    for rank, tiling in enumerate(sources):
        for tile in tiling:
            held[tile.name].setdefault(tile.box, {})[rank] = tile
    sent = [0] * len(sources)
    return Plan(
        [move for rank, tiling in enumerate(targets) for tile in tiling for move in _cover(rank, tile, held[tile.name], nodes, sent)]
    )


def _cover(rank: int, tile: Tile, held: dict[Box, dict[int, Tile]], nodes: Sequence[int], sent: list[int]) -> list[Move]:
    def distance(holder: int) -> int:
        return (holder != rank) + (nodes[holder] != nodes[rank])

    nearest = []
    for box, holders in held.items():
        if intersect(box, tile.box):
            holder = min(holders, key=lambda r: (distance(r), sent[r], (r - rank) % len(nodes)))
            nearest.append((distance(holder), box, holder))
    moves, missing = [], [tile.box]
    for _, box, holder in sorted(nearest):
        rest: list[Box] = []
        for part in missing:
            common = intersect(part, box)
            if common is None:
                rest.append(part)
                continue
            rest += subtract(part, common)
            moves.append(Move(holder, rank, common, held[box][holder], tile))
            sent[holder] += numel(common) * (holder != rank)
        missing = rest
    assert not missing, f"no rank holds {tile.name} {missing}, which rank {rank} needs for {tile.local}"
    return moves
