"""Boxes and tiles of weights. Every weight format is a tiling of the same canonical tensors.

The canonical tensors are those of a Llama's Hugging Face files. All layouts share one view of each. For q, k and v
projections it is [kv_heads, rows of one kv head's group, hidden] (biases without hidden). All other tensors keep their
own shape. A box is a range in each dimension of that view. A tile is the location of a box on one rank. To convert,
load, save or reshard weights, intersect two tilings and copy the boxes. This module does not import torch: view() only
calls methods of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[tuple[int, int], ...]  # (low, high) per dimension of the canonical view
Geometry = tuple[
    tuple[int, ...], tuple[int, ...], int
]  # (size, strides, offset) of a part of a contiguous tensor, in elements


@dataclass(frozen=True, slots=True)
class Tile:
    """The location of a box of a canonical tensor in a local tensor.

    Rows start : start + rows of the local tensor, viewed with `shape`, contain the box from the offsets `at` on.
    """

    name: str  # the canonical tensor
    box: Box
    local: str  # the local tensor
    start: int
    rows: int
    shape: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of one row of the local tensor: the dimensions of `shape` after those that count rows."""
        first = next(n for n in range(1, len(self.shape) + 1) if prod(self.shape[:n]) == self.rows)
        return self.shape[first:]


def by_local(tiling: Sequence[Tile]) -> dict[str, list[Tile]]:
    """The tiles of each local tensor, by its name."""
    found: dict[str, list[Tile]] = {}
    for tile in tiling:
        found.setdefault(tile.local, []).append(tile)
    return found


def numel(box: Box) -> int:
    return prod(high - low for low, high in box)


def intersect(a: Box, b: Box) -> Box | None:
    """Return the intersection of a and b; None if it is empty."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(low < high for low, high in common) else None


def subtract(box: Box, hole: Box) -> list[Box]:
    """Return disjoint boxes that cover `box` without `hole`. `hole` must be inside `box`."""
    rest = []
    for dim, ((low, high), (first, last)) in enumerate(zip(box, hole, strict=True)):
        for side in ((low, first), (last, high)):
            if side[0] < side[1]:
                rest.append(hole[:dim] + (side,) + box[dim + 1 :])
    return rest


def split(box: Box, limit: int) -> list[Box]:
    """Split box into pieces of at most `limit` elements, along the outermost dimension that can be split."""
    if numel(box) <= limit:
        return [box]
    dim = next(dim for dim, (low, high) in enumerate(box) if high - low > 1)
    low, high = box[dim]
    middle = (low + high) // 2
    halves = (box[:dim] + (side,) + box[dim + 1 :] for side in ((low, middle), (middle, high)))
    return [piece for half in halves for piece in split(half, limit)]


def within(tile: Tile, start: int, stop: int) -> list[Box]:
    """Return the parts of tile.box that are in the elements start : stop of the flattened local tensor.

    The boxes are disjoint, and at most two per dimension and one more.
    """
    first = tile.start * prod(tile.shape) // tile.rows  # the flat index of the tile's first row
    region = tuple((at, at + high - low) for at, (low, high) in zip(tile.at, tile.box, strict=True))
    found = []
    for part in _ranges(tile.shape, max(0, start - first), min(prod(tile.shape), stop - first)):
        if common := intersect(part, region):
            moved = zip(common, tile.at, tile.box, strict=True)
            found.append(tuple((a - at + low, b - at + low) for (a, b), at, (low, _) in moved))
    return found


def _ranges(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Return disjoint boxes of indices that cover the elements start : stop of a contiguous tensor."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start, stop),)]
    row = prod(shape[1:])
    low, high = -(-start // row), stop // row  # rows low : high are complete
    if low > high:  # the elements are inside one row
        return [((high, low), *box) for box in _ranges(shape[1:], start - high * row, stop - high * row)]
    head = [((low - 1, low), *box) for box in _ranges(shape[1:], start - (low - 1) * row, row)] if start % row else []
    whole = [((low, high), *((0, n) for n in shape[1:]))] if low < high else []
    tail = [((high, high + 1), *box) for box in _ranges(shape[1:], 0, stop % row)]
    return head + whole + tail


def geometry(tile: Tile, box: Box) -> Geometry:
    """Return the location of `box`, which must be inside tile.box, in the contiguous local tensor."""
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
    """Return a strided view of the local tensor for `box`, which must be inside tile.box. It is never a copy."""
    return shaped(tensor, geometry(tile, box))


def shaped(tensor: Tensor, place: Geometry) -> Tensor:
    """Return a view of a contiguous tensor for a geometry."""
    assert tensor.is_contiguous(), f"a local tensor of shape {tuple(tensor.shape)} is not contiguous"
    size, strides, offset = place
    return tensor.as_strided(size, strides, tensor.storage_offset() + offset)
