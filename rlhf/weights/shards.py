"""The training state of a model, as the ranks of any layout hold it, and the files that contain it.

Each parameter has a float32 value (main) and, after the first update, two moments. A rank holds a range of each of its
flattened local tensors: all of it, or with the distributed optimizer a part. fill() copies the state of all ranks of
one layout to a rank of any other layout, by the tiles and ranges of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rlhf.model.architecture import Architecture
from rlhf.model.families import EMBEDDING, HEAD
from rlhf.parallel.layout import Place
from rlhf.weights import header, names
from rlhf.weights.entries import Entry, kind, mapped
from rlhf.weights.tiles import Box, Geometry, Tile, geometry, intersect, shaped, subtract, within

MAIN = "main"
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 1 << 24  # bytes that are written at a time


class Shard(Protocol):
    """A rank's part of a training state."""

    @property
    def tiling(self) -> Sequence[Tile]:
        """All tiles of the rank."""
        ...

    @property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """Local tensor -> (start, stop) of the elements that the rank holds."""
        ...

    def view(self, what: str, local: str, place: Geometry) -> Tensor:
        """Return elements of a local tensor. what: MAIN or one of MOMENTS. place: counted from the range's start."""
        ...


@dataclass(frozen=True, slots=True)
class LiveShard:
    """A shard in memory."""

    updates: int  # number of updates so far; 0: no moments
    tiling: Sequence[Tile]
    starts: Mapping[str, int]  # local tensor -> index of its first element here
    tensors: Mapping[str, Mapping[str, Tensor]]  # MAIN, MOMENTS -> local tensor -> [n]

    @property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {local: (start, start + len(self.tensors[MAIN][local])) for local, start in self.starts.items()}

    def view(self, what: str, local: str, place: Geometry) -> Tensor:
        return shaped(self.tensors[what][local], place)

    def write(self, call: Callable[[memoryview], object]) -> None:
        """Write a safetensors file: pass its bytes to `call`, part by part. A part is valid only during its call."""
        import torch

        held = {f"{what}.{local}": t for what, each in self.tensors.items() for local, t in each.items()}
        about = {"updates": str(self.updates), "starts": json.dumps(dict(self.starts))}
        text, _ = header.text({name: (kind(t.dtype), tuple(t.shape)) for name, t in held.items()}, about)
        call(memoryview(text))
        # Parts are copied, because torch cannot free the storage of a tensor that shares its memory with numpy.
        buffer = torch.empty(CHUNK, dtype=torch.uint8)
        for tensor in held.values():
            for part in tensor.contiguous().view(torch.uint8).split(CHUNK):
                call(buffer[: len(part)].copy_(part).numpy().data)


@dataclass
class StoredShard:
    """A shard in a file. It is opened when its ranges are needed, and only the requested elements are read."""

    path: Path
    tiling: Sequence[Tile]

    @property
    def updates(self) -> int:
        return int(header.metadata(self.path)["updates"])

    @cached_property
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        starts = json.loads(header.metadata(self.path)["starts"])
        return {local: (start, start + self._entries[f"{MAIN}.{local}"].shape[0]) for local, start in starts.items()}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return header.entries(self.path)

    def view(self, what: str, local: str, place: Geometry) -> Tensor:
        entry, (size, strides, offset) = self._entries[f"{what}.{local}"], place
        span = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        start = entry.start + header.BYTES[entry.dtype] * offset
        part = replace(entry, shape=(span,), start=start, stop=start + header.BYTES[entry.dtype] * span)
        return shaped(mapped(part), (size, strides, 0))


def tiling(arch: Architecture, place: Place) -> list[Tile]:
    """Return the tiles of one rank. The rows that pad the vocabulary are like other rows, because they are trained."""
    return names.tiles(replace(arch, vocab=arch.padded_vocab(place.tp[1])), "megatron", place)


def fill(target: LiveShard, sources: Iterable[Shard], arch: Architecture) -> None:
    """Fill a rank's shard from those of another layout.

    Each element is copied from the first source that holds it. Rows that pad the vocabulary keep their values if no
    source has them. Sources without any needed tensor are not opened.
    """
    missing: dict[str, list[tuple[Tile, Box]]] = {}
    for tile, box in _boxes(target):
        missing.setdefault(tile.name, []).append((tile, box))
    for source in sources:
        for tile, box in _boxes(source, missing):
            rest = []
            for own, part in missing[tile.name]:
                common = intersect(part, box)
                if not common:
                    rest.append((own, part))
                    continue
                for what in target.tensors:
                    _view(target, what, own, common).copy_(_view(source, what, tile, common))
                rest += [(own, piece) for piece in subtract(part, common)]
            missing[tile.name] = rest
        missing = {name: parts for name, parts in missing.items() if parts}
    lacking = [(name, box) for name, parts in missing.items() for _, box in parts]
    assert all(name in (EMBEDDING, HEAD) and box[0][0] >= arch.vocab for name, box in lacking), (
        f"no file of the checkpoint has {lacking[0]}"
    )


def _boxes(shard: Shard, wanted: Iterable[str] | None = None) -> Iterator[tuple[Tile, Box]]:
    """Yield the boxes that a shard holds, of all tensors or of the wanted ones."""
    for tile in shard.tiling:
        if (wanted is None or tile.name in wanted) and tile.local in shard.ranges:
            yield from ((tile, box) for box in within(tile, *shard.ranges[tile.local]))


def _view(shard: Shard, what: str, tile: Tile, box: Box) -> Tensor:
    size, strides, offset = geometry(tile, box)
    return shard.view(what, tile.local, (size, strides, offset - shard.ranges[tile.local][0]))
