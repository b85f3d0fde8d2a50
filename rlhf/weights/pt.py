"""Files of torch.save, read by torch.load with weights_only and a list of what they may name: nothing in them is executed."""

from __future__ import annotations

import argparse
import io
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.weights.entries import intact

# What a checkpoint of Megatron-LM may name beside tensors, arrays and plain containers (its own list is megatron.core.safe_globals):
# in args, in states of random generators and reruns, and as the extra states of Transformer Engine's layers. Nobody here needs their
# values, so all of them are stood in for. A member of an enum is CLASS(value), or, as some releases of Python 3.11 write it (Debian's
# 3.11.2 is one), getattr(CLASS, name); these and older ones write a member of signal.Signals as a global, signal.SIGTERM.
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


class StandIn:
    """An instance of a class that is not imported."""

    def __init__(self, *values: Any):
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.values = (state,)


def read(path: Path, place: tuple[int, int] | None = None) -> dict[str, Any]:
    """The tree in a file; its tensors are mappings that nobody has touched. Or, with place (start, length), the tree in a list of one in
    a file within the file, as megatron-core's shards hold objects.

    Raises UserError where the file is damaged, or asks for more than weights and numbers, and OSError where it may not be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; copy the checkpoint again, completely")
    path.open("rb").close()  # zipfile says of a file that may not be read that it is none of its own
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
        raise UserError(f"{path}: not a file of torch.save, or cut short at {path.stat().st_size} bytes; copy it again")
    with _allowed(known), intact(path, "a checkpoint"):
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(_opened(path, place)))
        if refused:
            raise _distrust(path, ", ".join(sorted(refused)))
        tree = torch.load(_opened(path, place), map_location="cpu", weights_only=True, mmap=not place)
        tree = tree[0] if place else tree
        assert isinstance(tree, dict), f"it holds a {type(tree).__name__}, not a dict"
    return tree


def _member(path: Path, owner: Any, name: Any) -> StandIn:
    """What a file's getattr gives: a stand-in for a member of an enum that is one itself. No attribute of anything is looked up."""
    if owner is not StandIn or not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise _distrust(path, f"getattr({owner!r}, {name!r})")
    return StandIn(name)


def write(tree: Any, path: Path) -> None:
    """torch.save. Raises OSError with the path where the file cannot be written, of which torch tells no more than that."""
    import torch

    try:
        torch.save(tree, path)
    except RuntimeError as error:
        raise OSError(EIO, "torch.save cannot write it as a whole; is the storage full?", str(path)) from error


def _distrust(path: Path, asked: str) -> UserError:
    return UserError(f"{path}: it asks for {asked}, and only weights and numbers are read: do not trust this file")


def _opened(path: Path, place: tuple[int, int] | None) -> Any:
    if not place:
        return path
    with path.open("rb") as file:
        file.seek(place[0])
        return io.BytesIO(file.read(place[1]))


@contextmanager
def _allowed(known: list[Any]) -> Iterator[None]:
    """Let torch.load build known alone: what others have allowed (megatron.core does, on import) would widen it, and hide our stand-ins."""
    import torch

    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
