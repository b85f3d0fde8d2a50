"""The location of a stored tensor: a range of bytes in a file, for all formats. It is read by memory-mapping."""

from __future__ import annotations

import mmap
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import UserError, naming

if TYPE_CHECKING:
    import torch

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # name in safetensors -> name in torch
Shape = tuple[int, ...]
# Exceptions that Python raises while it parses a damaged file or a file of another kind.
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


# The part of an error message after the name of a folder.
UNSOUND = "its weights are not finite, or beyond 1e19: it is damaged or was ruined in training, give a sound model"


@dataclass(frozen=True, slots=True)
class Entry:
    """The location of one stored tensor, which is little-endian."""

    path: Path
    dtype: str  # its name in safetensors
    shape: Shape
    start: int  # offset in the file, in bytes
    stop: int
    strides: Shape | None = None  # in elements; None: the tensor is contiguous


def kind(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors: torch.bfloat16 -> BF16. Dtypes not in DTYPES keep torch's name."""
    name = str(dtype).removeprefix("torch.")
    return next((kind for kind, known in DTYPES.items() if known == name), name)


def mapped(entry: Entry) -> torch.Tensor:
    """Return the stored tensor as a memory-mapping of its file.

    A page is read when it is first accessed. The pages are released together with the tensor. A tensor that is stored
    with strides is copied.
    """
    import torch

    dtype = getattr(torch, DTYPES[entry.dtype])
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=dtype)
    first = entry.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with entry.path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), entry.stop - first, access=mmap.ACCESS_COPY, offset=first)
    pages.madvise(mmap.MADV_WILLNEED)  # the kernel reads ahead in large requests, in the background
    count = (entry.stop - entry.start) // dtype.itemsize
    flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=entry.start - first)
    return flat.view(entry.shape) if entry.strides is None else flat.as_strided(entry.shape, entry.strides).contiguous()


def store(entry: Entry, tensor: torch.Tensor) -> None:
    """Write a tensor with the entry's shape and dtype to the entry's location."""
    import torch

    assert (tuple(tensor.shape), kind(tensor.dtype)) == (entry.shape, entry.dtype), (
        f"{entry} is not for {tensor.shape} {tensor.dtype}"
    )
    with naming(entry.path), entry.path.open("r+b") as file:
        file.seek(entry.start)
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def intact(path: Path, what: str) -> Iterator[None]:
    """Raise UserError with the path if the code inside cannot parse the file. what: the expected kind of file."""
    try:
        yield
    except DAMAGED as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise UserError(f"{path}: damaged, or not {what} ({reason}); copy it again") from None


def groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split the names, in order, into groups of at most `limit` bytes. A larger tensor gets a group of its own.

    sizes: name -> bytes.
    """
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
    """Return the first `count` names and the number of the others, for a message."""
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")
