"""megatron-core's sharded checkpoints (torch_dist). They are read and written as plain files, without a process group.

    iter_0000001/.metadata      a pickle: key -> global shape, dtype and chunks; chunk -> file, offset and length
                 __0_0.distcp   the chunks, one after another; each is a file of torch.save
                 common.pt      data that is not sharded, such as args (since megatron-core 0.19 in a .distcp)
                 metadata.json  the names of these formats

A key covers all layers. The first dimension of its global shape, and of its chunks' offsets, is the layer. The other
dimensions are those of the tensor before tensor parallelism cuts it. In linear_fc1, all gate rows come before all up
rows.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.model.architecture import Architecture
from rlhf.parallel.layout import Place
from rlhf.weights import names, pt
from rlhf.weights.entries import Entry, Shape, intact, kind
from rlhf.weights.formats import args
from rlhf.weights.formats.format import Target
from rlhf.weights.formats.megatron import METADATA, Megatron, MegatronContents, iteration_folder, number, title
from rlhf.weights.formats.metadata import Metadata
from rlhf.weights.tiles import Tile, by_local

if TYPE_CHECKING:
    import torch

COMMON, DATA = "common.pt", "__0_0.distcp"
COMMON_OBJECT = "common_state/shard_0_1"  # key of the data of common.pt if there is no such file
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
EMBEDDING = "embedding.word_embeddings.weight"
LAYERS = "decoder.layers."
FC1 = "mlp.linear_fc1.weight"
# These linear layers have an (empty) extra state.
EXTRA = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True, slots=True)
class ShardedContents(MegatronContents):
    """The tensors of a checkpoint as one shard. Each chunk has its own name, LOCAL#NUMBER.

    LOCAL is megatron-core's local name for tp=1 and pp=1. NUMBER is the index of the chunk in order of its offsets.
    """

    @property
    def vocab(self) -> int:
        return sum(entry.shape[0] for local, entry in self.shards[0].items() if local.startswith(f"{EMBEDDING}#"))

    def tilings(self, arch: Architecture, pad: bool = False) -> list[list[Tile]]:
        """Return the tiles of the only shard.

        The n chunks of a tensor belong to n tensor-parallel ranks. In linear_fc1, each rank has two chunks.
        """

        @cache
        def held(rank: int, ranks: int) -> dict[str, list[Tile]]:
            return by_local(names.tiles(arch, self.layout, Place((rank, ranks)), rows=self.vocab, pad=pad))

        counts = Counter(name.partition("#")[0] for name in self.shards[0])
        found = []
        for local in names.shapes(names.tiles(arch, self.layout, rows=self.vocab, pad=True)):
            count = counts[local]
            halves = local.endswith(FC1) and count > 1
            ranks = max(1, count // 2 if halves else count)
            for rank in range(ranks):
                for i, tile in enumerate(held(rank, ranks).get(local, [])):
                    start, chunk = (0, rank + i * ranks) if halves else (tile.start, rank)
                    found.append(replace(tile, local=f"{local}#{chunk}", start=start))
        return [found]


class TorchDist(Megatron):
    """Sharded checkpoints, which megatron-core can load with any tp and pp."""

    split, sign = False, METADATA

    def __init__(self) -> None:
        super().__init__("torch_dist", "megatron-te")

    def open(self, folder: Path, iteration: int | None = None) -> ShardedContents:
        path = iteration_folder(folder, iteration)
        with intact(path, "a checkpoint"):
            contents = self._open(path)
        args.check(path, contents.args)
        return contents

    def _open(self, path: Path) -> ShardedContents:
        """Return the contents of a checkpoint, with every chunk. Optimizer states are skipped."""
        with intact(path / METADATA, "a checkpoint's metadata"):
            metadata = Metadata(path / METADATA).load()
            chunks = _chunks(path, metadata)
        if not all(len(entry.shape) == 2 for entry in chunks.get(EMBEDDING, [])) or EMBEDDING not in chunks:
            raise UserError(f"{path}: no matrix {EMBEDDING}; this is not a GPT model's checkpoint")
        common = _common(path, metadata.storage_data)
        fused = any(name.endswith("linear_qkv.layer_norm_weight") for name in chunks)
        entries = {f"{local}#{i}": entry for local, held in chunks.items() for i, entry in enumerate(held)}
        layout = "megatron-te" if fused else "megatron"
        return ShardedContents(path, self.name, layout, [entries], args.read(common), number(common))

    def lay_out(self, target: Target) -> dict[str, list[Tile]]:
        tiling = names.tiles(target.arch, self.layout, rows=target.rows, pad=True)
        return {f"{title(target.iteration)}/{DATA}": tiling}

    def begin(self, target: Target, path: Path, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
        """Create the file of chunks, and write the other files of the iteration."""
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
        from torch.distributed.checkpoint.metadata import Metadata as Content

        path.parent.mkdir(parents=True, exist_ok=True)
        layers, dtype = target.arch.layers, target.dtype
        tensors: dict[str, Any] = {}
        where: dict[Any, Any] = {}
        found: dict[str, Entry] = {}
        with path.open("wb") as file:
            for local, shape in shapes.items():
                layer, key = _key(local)
                sizes, offsets, whole = shape, [0] * len(shape), torch.Size(shape)
                if layer is not None:
                    sizes, offsets, whole = (1, *shape), [layer, *offsets], torch.Size((layers, *shape))
                described = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), whole, []))
                described.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                start = file.tell()
                data, length = _append(file, path, torch.empty(sizes, dtype=dtype))
                where[MetadataIndex(key, offsets)] = _StorageInfo(path.name, start, length)
                found[local] = Entry(path, kind(dtype), shape, data, data + prod(shape) * dtype.itemsize)
            empty = io.BytesIO()
            torch.save([None], empty)
            for key in [f"{LAYERS}{x}._extra_state/shard_{i}_{layers}" for x in EXTRA for i in range(layers)]:
                tensors[key] = BytesStorageMetadata()
                where[MetadataIndex(key)] = _StorageInfo(path.name, file.tell(), file.write(empty.getvalue()))
        content = Content(tensors, storage_data=where, storage_meta=StorageMeta(), version="1.0.0")
        (path.parent / METADATA).write_bytes(pickle.dumps(content))
        common = {
            "args": argparse.Namespace(**args.describe(target)),
            "checkpoint_version": 3.0,
            "iteration": target.iteration,
        }
        pt.write(common, path.parent / COMMON)
        (path.parent / "metadata.json").write_text(json.dumps(BACKENDS))
        return found


def _chunks(folder: Path, metadata: Any) -> dict[str, list[Entry]]:
    """Return local name -> the locations of its chunks, in order of their offsets."""
    found: dict[str, dict[tuple[int, ...], Entry]] = {}
    for index, info in metadata.storage_data.items():
        key = index.fqn.removeprefix("model.")
        stored = metadata.state_dict_metadata.get(index.fqn)
        if (
            key.startswith(("optimizer", "rng_state", "rerun"))
            or "_extra_state" in key
            or not index.offset
            or not hasattr(stored, "chunks")
        ):
            continue
        offsets, layered = tuple(index.offset), key.startswith(LAYERS) and _key(key)[0] is None
        local = f"{LAYERS}{offsets[0]}.{key.removeprefix(LAYERS)}" if layered else key
        sizes = next(tuple(chunk.sizes) for chunk in stored.chunks if tuple(chunk.offsets) == offsets)
        shape = sizes[1:] if layered else sizes
        entry = _entry(folder / info.relative_path, info.offset, info.length, shape, stored.properties.dtype)
        found.setdefault(local, {})[offsets] = entry
    return {local: [held[at] for at in sorted(held)] for local, held in found.items()}


def _common(folder: Path, stored: Mapping[Any, Any]) -> dict[str, Any]:
    info = next((info for index, info in stored.items() if index.fqn == COMMON_OBJECT), None)
    if info is None or (folder / COMMON).exists():
        return pt.read(folder / COMMON)
    return pt.read(folder / info.relative_path, (info.offset, info.length))


def _key(local: str) -> tuple[int | None, str]:
    """decoder.layers.3.mlp.x -> (3, decoder.layers.mlp.x)."""
    match = re.match(rf"{re.escape(LAYERS)}(\d+)\.(.*)", local)
    return (int(match[1]), LAYERS + match[2]) if match else (None, local)


def _append(file: io.BufferedWriter, path: Path, tensor: torch.Tensor) -> tuple[int, int]:
    """Append the file that torch.save would write for a tensor, with a hole instead of its bytes.

    Return the offset of the hole in the whole file, and the length of the appended file, in bytes.
    """
    import torch

    alone, start = path.with_suffix(".partial"), file.tell()
    with torch.serialization.skip_data():
        pt.write(tensor, alone)
    hole, length = _data(alone, 0, alone.stat().st_size), alone.stat().st_size
    with alone.open("rb") as source:
        file.write(source.read(hole))
        source.seek(hole + tensor.nbytes)
        file.seek(start + hole + tensor.nbytes)
        file.write(source.read())
    alone.unlink()
    return start + hole, length


def _data(path: Path, start: int, length: int) -> int:
    """Return the offset of the bytes of the only storage in a torch.save file.

    The torch.save file is at start : start + length of the file `path`. The offset is relative to `start`.
    """
    with path.open("rb") as file:
        part = FileRange(file, start, length)
        record = next(info for info in zipfile.ZipFile(part).infolist() if info.filename.endswith("/data/0"))
        part.seek(record.header_offset + 26)
        sizes = part.read(4)  # sizes of the name and of the extra field, which aligns the data
        return record.header_offset + 30 + int.from_bytes(sizes[:2], "little") + int.from_bytes(sizes[2:], "little")


def _entry(path: Path, start: int, length: int, shape: Shape, dtype: torch.dtype) -> Entry:
    if not path.exists() or path.stat().st_size < start + length:
        raise UserError(f"{path}: missing or cut short; copy the whole checkpoint again")
    first = start + _data(path, start, length)
    assert prod(shape) * dtype.itemsize <= start + length - first, f"{path} at {start} holds less than {list(shape)}"
    return Entry(path, kind(dtype), tuple(shape), first, first + prod(shape) * dtype.itemsize)


class FileRange(io.RawIOBase):
    """Makes a range of a file readable like a file."""

    def __init__(self, file: Any, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        data = self.file.read(min(len(buffer), max(0, self.length - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
