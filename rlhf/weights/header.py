"""The header of a safetensors file.

The file has three parts: the length of the header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
data_offsets), and the bytes of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError
from rlhf.weights.entries import Entry, Shape

BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def text(tensors: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Return the bytes of a file before its tensors, and the size of the tensors in bytes.

    tensors: name -> (dtype, shape). They follow one another in this order.
    """
    held: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + prod(shape) * BYTES[dtype]
        held[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
    found = json.dumps(held, separators=(",", ":")).encode()
    found += b" " * (-len(found) % 8)  # align the data
    return len(found).to_bytes(8, "little") + found, stop


def entries(path: Path) -> dict[str, Entry]:
    """Return the locations of all tensors of a file.

    The safetensors library validates the header. It does not return offsets, so the header is parsed again here.
    """
    held, first = _read(path)
    held.pop("__metadata__", None)
    found = {}
    for name, at in held.items():
        start, stop = (first + offset for offset in at["data_offsets"])
        found[name] = Entry(path, at["dtype"], tuple(at["shape"]), start, stop)
    return found


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file."""
    return _read(path)[0].get("__metadata__", {})


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a file, and where its tensors begin. Raises UserError if it is not valid."""
    from safetensors import SafetensorError, safe_open

    with texts.fetched(path).open("rb") as file:  # an OSError of this has the path, that of the library has not
        try:
            with safe_open(path, framework="np"):  # this validates the header and reads no tensor
                pass
        except SafetensorError as error:
            why = f"{error}; {path.stat().st_size} bytes"
            raise UserError(f"{path}: damaged, or not a safetensors file ({why}); download it again") from None
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length
