"""Writes folders of weights in any format, from a model on many ranks or in batches from another source."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import progress
from rlhf.errors import naming
from rlhf.model.architecture import Architecture
from rlhf.weights import names
from rlhf.weights.entries import DTYPES, Entry, Shape, groups, kind, store
from rlhf.weights.formats import FORMATS, Target
from rlhf.weights.plan import Plan
from rlhf.weights.tiles import Tile, by_local

if TYPE_CHECKING:
    import torch

    from rlhf.weights.publish import Transform

# Fills tensors. Arguments: the tiles that each rank needs now, and this rank's tensors for them by local name.
Fill = Callable[[list[list[Tile]], dict[str, "torch.Tensor"]], None]


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
    format: str = "hf",
    tp: int = 1,
    pp: int = 1,
    transform: Transform | None = None,
) -> None:
    """Write a model that is distributed over ranks as a folder. Every rank must call this.

    folder      new or empty, on storage that all ranks share. After an interruption it has no config.json or no tracker
                file.
    config      the content of config.json without the dtype
    sources     the tiles of every rank
    parameters  this rank's tensors, by local name
    nodes       the node of every rank
    dtype       of the files
    shard       largest number of bytes of tensors in a Hugging Face file (a larger tensor gets a file of its own)
    bucket      largest number of bytes of tensors in memory on a rank at a time (or two tensors, if they are larger)
    format      in FORMATS; tp and pp are its layout if the format has files per rank
    transform   applied to every local tensor before it is cut into boxes
    """
    from rlhf.weights.publish import Publisher

    device = next(iter(parameters.values())).device

    def fill(targets: list[list[Tile]], tensors: dict[str, torch.Tensor]) -> None:
        Publisher(Plan(sources, targets, nodes), rank, dtype, bucket, transform).publish(parameters, tensors)

    form = FORMATS[format]
    layout = {"tp": tp, "pp": pp} if form.split else {}
    target = Target(form, arch, dtype, shard=shard, **layout)
    for _ in write_batches(Path(folder), target, fill, rank=rank, world=len(sources), bucket=bucket, device=device):
        pass
    if rank == 0:
        finish(target, Path(folder), config)
    _barrier(len(sources))


def finish(target: Target, folder: Path, config: Mapping[str, Any]) -> None:
    """Write the small files beside the weights. config: the content of config.json without the dtype."""
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers has renamed this key and reads both names
    with naming(folder):
        target.format.finish(target, folder, {**config, key: DTYPES[kind(target.dtype)]})


def write_batches(
    folder: Path,
    target: Target,
    fill: Fill,
    *,
    rank: int,
    world: int,
    bucket: int,
    device: Any = "cpu",
) -> Iterator[int]:
    """Write the files of a target. Each rank writes some of them. After each batch, yield the bytes of this rank.

    A batch has tensors of at most bucket / 2 bytes, or one tensor. All ranks have the same number of batches. While one
    batch is assembled, the batch before it is written.
    """
    import torch

    dtype = target.dtype
    titles, count = list(target.files), len(target.files)
    owned = [[title for i, title in enumerate(titles) if i * world // count == r] for r in range(world)]
    folder.mkdir(parents=True, exist_ok=True)
    assert not any((folder / title).exists() for title in owned[rank]), f"{folder} already holds weights"
    shapes = {title: names.shapes(tiling) for title, tiling in target.files.items()}
    stored = {}
    for title in owned[rank]:
        with naming(folder / title):
            stored[title] = target.format.begin(target, folder / title, shapes[title])
    tiling = {title: by_local(tiles) for title, tiles in target.files.items()}
    cut = {title: _batches(shapes[title], dtype, bucket // 2) for title in titles}
    batches = [[(title, group) for title in held for group in cut[title]] for held in owned]
    largest = max((sum(prod(shapes[title][local]) for local in group) for title, group in batches[rank]), default=0)
    # All batches use two buffers: one is filled while the other is written. New memory would cost more than the copies.
    buffers = deque(torch.empty(largest, dtype=dtype, device=device) for _ in range(2))
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:
        for batch in zip_longest(*batches):  # a batch per rank; None: the rank has no more batches
            if len(writing) == len(buffers):
                writing.popleft().result()
            wanted = [[tile for local in one[1] for tile in tiling[one[0]][local]] if one else [] for one in batch]
            title, group = batch[rank] or ("", [])
            sizes = [prod(shapes[title][local]) for local in group]
            pieces = buffers[0][: sum(sizes)].split(sizes)
            buffers.rotate()
            tensors = {local: piece.view(shapes[title][local]) for local, piece in zip(group, pieces, strict=True)}
            fill(wanted, tensors)
            # Copy to the CPU here, because the writer's thread would use another stream of the device.
            held = {local: tensor.cpu() for local, tensor in tensors.items()}
            writing.append(writer.submit(_store, stored.get(title, {}), held))
            yield sum(sizes) * dtype.itemsize
        for last in writing:
            last.result()
    _barrier(world)


def _store(entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    for local, tensor in tensors.items():
        progress.move()
        store(entries[local], tensor)


def _batches(shapes: Mapping[str, Shape], dtype: torch.dtype, bucket: int) -> list[list[str]]:
    return groups({local: prod(shape) * dtype.itemsize for local, shape in shapes.items()}, bucket)


def _barrier(world: int) -> None:
    import torch.distributed as dist

    if world > 1:
        dist.barrier()
