"""Files of torch.save, read by torch.load with weights_only and a list of what they may name: nothing in them is executed."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.contracts import UserError

# What the pickle of a checkpoint may name beside tensors and plain containers. Classes of Megatron-LM are stood in for.
ENUMS = (
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.transformer.enums.AttnBackend",
)


class StandIn:
    """An instance of a class of Megatron-LM that is not imported."""

    def __init__(self, *values: Any):
        self.values = values


def read(path: Path) -> dict[str, Any]:
    """The tree in a file; its tensors are mappings that nobody has touched.

    Raises UserError where the file is cut short, or asks for more than weights and numbers.
    """
    import numpy as np
    import torch

    known: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(x)) for x in ("u4", "i8", "f8"))]
    known += [(StandIn, name) for name in ENUMS]
    reconstruct = np.empty(0).__reduce__()[0]
    known += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    if not path.exists():
        raise UserError(f"{path}: missing; copy the checkpoint again, completely")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a file of torch.save, or cut short at {path.stat().st_size} bytes; copy it again")
    with _allowed(known):
        refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if refused:
            raise UserError(
                f"{path}: it asks for {', '.join(sorted(refused))}, and only weights and numbers are read: do not trust this file"
            )
        try:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
            raise UserError(f"{path}: not readable: {str(error).splitlines()[0][:200]}") from None
    return tree


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
