"""Reads and writes files of torch.save. No code in them is executed.

They are read by torch.load with weights_only and a list of the globals that a file may refer to.
"""

from __future__ import annotations

import argparse
import io
import signal
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EIO
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.weights.entries import Entry, intact, kind

if TYPE_CHECKING:
    import torch

# The globals that a checkpoint of Megatron-LM may refer to, beside tensors, arrays and plain containers. They are in
# args, in the states of random generators and reruns, and in the extra states of Transformer Engine's layers.
# Megatron-LM's own list is megatron.core.safe_globals. Their values are not needed here, so a StandIn replaces them.
# A member of an enum is pickled as CLASS(value). Some releases of Python 3.11, such as Debian's 3.11.2, pickle
# getattr(CLASS, name) instead. These and older releases pickle a member of signal.Signals as a global such as
# signal.SIGTERM.
CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    *(
        f"megatron.core.transformer.enums.{x}"
        for x in ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
    ),
    *(
        "_io.BytesIO",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "signal.Signals",
        "types.SimpleNamespace",
        "torch._C.Generator",
    ),
)

BEFORE_ZIP = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # first bytes of a file of torch.save before torch 1.6


class StandIn:
    """Replaces an instance of a class that is not imported."""

    def __init__(self, *values: Any):
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.values = (state,)


def read(path: Path, place: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the tree of dicts in a file. Its tensors are memory-mapped, and their data is not read yet.

    place: (start, length) of a torch.save file inside this file. That file must contain a list of one tree, which is
    returned. megatron-core's shards store objects in this way.

    Raises UserError if the file is damaged or refers to other globals, and OSError if it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; copy the whole checkpoint again")
    texts.fetched(path)  # raises OSError without read permission; zipfile would report that it is no zip file
    import numpy as np
    import torch

    known: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(x)) for x in ("u4", "i8", "f8"))]
    known += [(StandIn, name) for name in CLASSES]
    known += [(StandIn(member.name), f"signal.{member.name}") for member in signal.Signals]
    known += [(partial(_member, path), "builtins.getattr")]
    for made in (np.empty(0), np.float64(0)):
        function: Any = made.__reduce__()[0]
        known += [(function, f"numpy.{core}.multiarray.{function.__name__}") for core in ("core", "_core")]
    if not zipfile.is_zipfile(_opened(path, place)):
        if texts.begins(path, BEFORE_ZIP):
            again = f"python -c \"import torch; f = '{path}'; torch.save(torch.load(f, weights_only=True), f)\""
            raise UserError(f"{path}: in the format of torch.save before torch 1.6; save it again: {again}")
        raise UserError(f"{path}: not a file of torch.save, or cut short at {path.stat().st_size} bytes; copy it again")
    with _allowed(known), intact(path, "a checkpoint"):
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(_opened(path, place)))
        if refused:
            raise _distrust(path, ", ".join(sorted(refused)))
        tree = torch.load(_opened(path, place), map_location="cpu", weights_only=True, mmap=not place)
        tree = tree[0] if place else tree
        assert isinstance(tree, dict), f"it holds a {type(tree).__name__}, not a dict"
    return tree


def entries(path: Path, tree: Mapping[str, Any], prefix: str = "") -> dict[str, Entry]:
    """Return the locations of the tensors in the tree that read() returned for this file.

    A name consists of the keys that lead to the tensor, joined by dots. Only names with the prefix are returned, and
    without it. The file is memory-mapped in one piece. So the offset of a tensor follows from its address: the storage
    with the lowest address is the first one in the file.
    """
    import torch

    reader = torch._C.PyTorchFileReader(str(path))
    if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":  # type: ignore[attr-defined]
        raise UserError(f"{path}: written on a big-endian machine; save it again on this one")
    stored = [record for record in reader.get_all_records() if record.startswith("data/")]
    records = {reader.get_record_offset(record) for record in stored}  # type: ignore[attr-defined]
    tensors = list(_flat(tree))
    addresses = {storage.data_ptr() for _, each in tensors if (storage := each.untyped_storage()).nbytes()}
    origin = min(addresses) - min(records) if addresses else 0
    assert {address - origin for address in addresses} <= records, f"{path}: its storages are not mapped in one piece"
    return {
        name.removeprefix(prefix): _entry(path, tensor, origin) for name, tensor in tensors if name.startswith(prefix)
    }


def _entry(path: Path, tensor: torch.Tensor, origin: int) -> Entry:
    """Return the location of a tensor. origin: the address of the first byte of the file."""
    start = tensor.data_ptr() - origin
    if tensor.is_contiguous():
        return Entry(path, kind(tensor.dtype), tuple(tensor.shape), start, start + tensor.nbytes)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    stop = start + (last + 1) * tensor.itemsize
    return Entry(path, kind(tensor.dtype), tuple(tensor.shape), start, stop, tensor.stride())


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a tree, each with its keys joined by dots."""
    import torch

    if isinstance(tree, torch.Tensor):
        yield prefix[:-1], tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _flat(value, f"{prefix}{i}.")


def _member(path: Path, owner: Any, name: Any) -> StandIn:
    """Return a StandIn for getattr(owner, name) in a file, where owner must be a StandIn for an enum.

    No attribute is looked up. Raises UserError for other arguments.
    """
    if owner is not StandIn or not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise _distrust(path, f"getattr({owner!r}, {name!r})")
    return StandIn(name)


def write(tree: Any, path: Path) -> None:
    """Call torch.save. Raises OSError with the path if the file cannot be written. torch's error names no path."""
    import torch

    try:
        torch.save(tree, path)
    except RuntimeError as error:
        raise OSError(EIO, "torch.save cannot write the whole file; is the storage full?", str(path)) from error


def _distrust(path: Path, asked: str) -> UserError:
    return UserError(f"{path}: it asks for {asked}, but only weights and numbers are read: do not trust this file")


def _opened(path: Path, place: tuple[int, int] | None) -> Any:
    if not place:
        return path
    with path.open("rb") as file:
        file.seek(place[0])
        return io.BytesIO(file.read(place[1]))


@contextmanager
def _allowed(known: list[Any]) -> Iterator[None]:
    """Allow torch.load to create objects of `known` only.

    Other packages, such as megatron.core on import, add globals to torch's list. They would allow more, and would take
    precedence over the StandIns.
    """
    import torch

    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
