"""Hugging Face folders of safetensors: checked by their headers, read box by box, written from a model on many ranks.

The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets), the data.
torch is imported where tensors are handled, so that a folder can be refused before anything else is loaded.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.contracts import UserError
from rlhf.model.architecture import Architecture
from rlhf.weights import names
from rlhf.weights.tiles import Tile, plan, view

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors -> of torch
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor is stored."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder, from the headers alone. Raises UserError where a file is missing, cut short or not safetensors."""
    found: dict[str, Entry] = {}
    for path in _paths(folder):
        found |= _header(path)
    return found


def check(folder: str | Path, arch: Architecture) -> None:
    """Raise UserError, naming the file, unless the folder holds exactly the tensors of arch. Reads headers only.

    A scalar model may come from a causal one: its head may be missing (read() makes zeros), and an output layer that it does not use is
    ignored.
    """
    folder = Path(folder)
    found, wanted = entries(folder), names.hf_shapes(arch)
    for name, shape in wanted.items():
        if name not in found and name == names.SCORE:
            continue
        if name not in found:
            raise UserError(f"{folder}: tensor {name} is missing; config.json asks for it, so download the weights that belong to it")
        entry = found[name]
        if entry.shape != shape:
            raise UserError(f"{entry.path}: {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}")
        if entry.dtype not in DTYPES:
            raise UserError(f"{entry.path}: {name} has dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
    ignored = {"lm_head.weight"} if arch.tied or not arch.lm else set()
    extra = [name for name in found if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise UserError(
            f"{found[extra[0]].path}: tensors {', '.join(extra[:3])}{more} are not part of a {arch.family} model of config.json's shape"
        )


def read(folder: str | Path, arch: Architecture, tiling: Sequence[Tile], parameters: Mapping[str, torch.Tensor]) -> None:
    """Fill live tensors (local name -> tensor) with the boxes of their tiles, cast to the tensors' own dtypes.

    Files are mapped, so only the pages of these boxes are read; rows that no tile covers are left alone. A scalar head that the
    folder lacks becomes zeros. The folder has passed check().
    """
    import torch

    found = entries(Path(folder))
    whole = {tile.name: tile for tile in names.tiles(arch, "hf")}
    with torch.no_grad():
        for tile in tiling:
            target = view(parameters[tile.local], tile, tile.box)
            if tile.name == names.SCORE and tile.name not in found:
                target.zero_()
            else:
                target.copy_(view(_map(found[tile.name]), whole[tile.name], tile.box))


def write(
    folder: str | Path,
    arch: Architecture,
    config: Mapping[str, Any],
    sources: Sequence[Sequence[Tile]],
    parameters: Mapping[str, torch.Tensor],
    *,
    rank: int,
    nodes: Sequence[int],
    dtype: torch.dtype,
    shard: int = 4 << 30,
    bucket: int = 512 << 20,
) -> None:
    """Write a model that lives on many ranks as a Hugging Face folder; every rank calls it.

    folder      new or empty, on storage that all ranks share
    config      what config.json will say, but for the dtype
    sources     the tiles of every rank; parameters are this rank's, by local name
    nodes       the node of every rank
    dtype       of the files
    shard       bytes of tensors per file, at most (a larger tensor gets a file of its own)
    bucket      bytes of tensors that a rank assembles at a time, at most (or one tensor)

    Files are shared out over the ranks, and each is streamed in the order of its header. They bear temporary names until
    all are complete, and config.json comes last: a folder without it was never finished.
    """
    import torch

    from rlhf.weights.publish import Publisher

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assert not list(folder.glob("*.safetensors")), f"{folder} already holds weights"
    shapes, world = names.hf_shapes(arch), len(sources)
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, shard)
    owners = {title: i * world // len(shards) for i, title in enumerate(shards)}
    stored: dict[str, Entry] = {}  # what this rank will write, and where
    for title in (title for title in shards if owners[title] == rank):
        stored |= _begin(folder / f"{title}.partial", {name: shapes[name] for name in shards[title]}, dtype)

    owned = [{name: sizes[name] for title in shards if owners[title] == r for name in shards[title]} for r in range(world)]
    batches = [_groups(of_rank, bucket) for of_rank in owned]
    whole = {tile.name: tile for tile in names.tiles(arch, "hf")}
    device = next(iter(parameters.values())).device
    for batch in zip_longest(*batches, fillvalue=()):  # one for every rank
        targets = [[whole[name] for name in of_rank] for of_rank in batch]
        tensors = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name in batch[rank]}
        Publisher(plan(sources, targets, nodes), rank, dtype, bucket).publish(parameters, tensors)
        for name, tensor in tensors.items():
            _store(stored[name], tensor)

    _barrier(world)
    for path in {entry.path for entry in stored.values()}:
        path.rename(path.with_suffix(""))  # without .partial
    _barrier(world)
    if rank == 0:
        key = "dtype" if "dtype" in config else "torch_dtype"  # transformers renamed it; it reads both
        _describe(folder, {**config, key: DTYPES[_kind(dtype)]}, shards, sum(sizes.values()))
    _barrier(world)


def _store(entry: Entry, tensor: torch.Tensor) -> None:
    import torch

    with entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(tensor.cpu().view(torch.uint8).numpy().data)


def _describe(folder: Path, config: Mapping[str, Any], shards: Mapping[str, list[str]], size: int) -> None:
    """The files beside the weights: an index of several shards, and config.json last."""
    if len(shards) > 1:
        where = {name: title for title, group in shards.items() for name in group}
        _save_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    _save_json(folder / "config.json", config)


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File -> its tensors."""
    groups = _groups(sizes, limit)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _kind(dtype: torch.dtype) -> str:
    return next(kind for kind, name in DTYPES.items() if str(dtype) == f"torch.{name}")


def _begin(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Entry]:
    """Write the header of a new file; where its tensors will go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in shapes.items():
        start, stop = stop, stop + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _kind(dtype), "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    return _header(path)


def _groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most limit bytes; a larger tensor is a group of its own."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)


def _barrier(world: int) -> None:
    import torch.distributed as dist

    if world > 1:
        dist.barrier()


def _paths(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, or model.safetensors, or whatever safetensors there are."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError):
            raise UserError(f"{index}: not an index of safetensors files; download it again") from None
        paths = [folder / name for name in listed]
    else:
        paths = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no *.safetensors file; save the model in that format first")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: missing, though {INDEX} lists it; download it again")
    return paths


def _header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100 << 20:  # the format's own limit; a text file's first letters make a far larger number
            raise UserError(f"{path}: not a safetensors file, or cut short at {size} bytes; download it again")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path}: cut short at {size} bytes, its header alone has {8 + length}; download it again")
    try:
        header = json.loads(text)
    except ValueError:
        raise UserError(f"{path}: not a safetensors file: its header is not JSON; download it again") from None
    header.pop("__metadata__", None)
    data = 8 + length
    found = {
        name: Entry(path, at["dtype"], tuple(at["shape"]), *(data + offset for offset in at["data_offsets"])) for name, at in header.items()
    }
    end = max((entry.stop for entry in found.values()), default=data)
    if size < end:
        raise UserError(f"{path}: cut short at {size} of {end} bytes; download it again")
    return found


def _map(entry: Entry) -> torch.Tensor:
    """The stored tensor as a mapping of its file: pages are read when they are touched, and given back with the tensor."""
    import torch

    base = entry.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with entry.path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), entry.stop - base, access=mmap.ACCESS_COPY, offset=base)
    dtype = getattr(torch, DTYPES[entry.dtype])
    return torch.frombuffer(pages, dtype=dtype, count=prod(entry.shape), offset=entry.start - base).view(entry.shape)
