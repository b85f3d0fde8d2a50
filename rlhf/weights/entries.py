"""Where a stored tensor lies: a range of bytes of some file, whatever the format. Reading maps it, writing fills it."""

from __future__ import annotations

import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors -> of torch
Shape = tuple[int, ...]
# What Python raises while it takes a file apart that is damaged, or something else.
DAMAGED: tuple[type[Exception], ...] = (
    *(
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        struct.error,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ),
    *(EOFError, AssertionError, ArithmeticError, StopIteration, MemoryError),
)


UNSOUND = "its weights are not finite, or beyond 1e19: it is damaged or was ruined in training, give a sound model"  # behind a folder's name


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor is stored, contiguous and little-endian."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: Shape
    start: int  # byte in the file
    stop: int


def kind(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> BF16; other dtypes, as safetensors would hardly call them, for a message."""
    name = str(dtype).removeprefix("torch.")
    return next((kind for kind, known in DTYPES.items() if known == name), name)


def mapped(entry: Entry) -> torch.Tensor:
    """The stored tensor as a mapping of its file: pages are read when they are touched, and given back with the tensor."""
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype])
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    first = entry.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with entry.path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), entry.stop - first, access=mmap.ACCESS_COPY, offset=first)
    pages.madvise(mmap.MADV_WILLNEED)  # in large requests, while we go on
    return torch.frombuffer(pages, dtype=dtype, count=prod(entry.shape), offset=entry.start - first).view(entry.shape)


def store(entry: Entry, tensor: torch.Tensor) -> None:
    """Write a tensor of the entry's shape and dtype to its place."""
    import torch

    assert (tuple(tensor.shape), kind(tensor.dtype)) == (entry.shape, entry.dtype), (
        f"{entry} is not for {tensor.shape} {tensor.dtype}"
    )
    with entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def intact(path: Path, what: str) -> Iterator[None]:
    """Tell the user which file it is whose content cannot be made sense of."""
    try:
        yield
    except DAMAGED as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise UserError(f"{path}: damaged, or not {what} ({reason}); copy it again") from None


def groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most limit bytes; a larger tensor is a group of its own."""
    found: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not found or filled + size > limit:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found


def some(names: Iterable[str], count: int = 3) -> str:
    """A few of many names, for a message."""
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")
