"""Reads the .metadata file of a torch_dist checkpoint. It is a pickle, and only shapes, dtypes and offsets are read."""

from __future__ import annotations

import io
import pickle
from enum import EnumType
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError

# The globals that the pickle may refer to: module -> names.
ALLOWED = {
    "torch": ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "MetadataIndex", "StorageMeta"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "collections": ("OrderedDict",),
}
# megatron-core 0.15 and earlier have subclasses of two of them: their module and name -> those of the base class.
OLDER = {
    ("megatron.core.dist_checkpointing.strategies.torch", f"MCore{name}"): (module, name)
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
    )
}


class Metadata(pickle.Unpickler):
    """Reads the pickle. Raises UserError if it refers to other globals."""

    def __init__(self, path: Path):
        self.path = path
        super().__init__(io.BytesIO(texts.regular(path).read_bytes()))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self.member
        module, name = OLDER.get((module, name), (module, name))
        if name not in ALLOWED.get(module, ()):
            raise self.distrust(f"{module}.{name}")
        return super().find_class(module, name)

    def member(self, owner: Any, name: Any) -> Any:
        """Return getattr(owner, name) for a member of an enum in ALLOWED. Raises UserError for anything else.

        Some releases of Python 3.11, such as Debian's 3.11.2, pickle a member as getattr(enum, name). Other releases
        pickle enum(value).
        """
        if type(owner) is not EnumType or not isinstance(name, str) or name not in owner.__members__:
            raise self.distrust(f"getattr({owner!r}, {name!r})")
        return owner.__members__[name]

    def distrust(self, asked: str) -> UserError:
        what = f"it asks for {asked}, but only shapes and offsets are read"
        return UserError(f"{self.path}: {what}: do not trust this file")
