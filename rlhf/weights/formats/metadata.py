"""The .metadata file of a torch_dist checkpoint: a pickle, of which only shapes, dtypes and offsets are read."""

from __future__ import annotations

import io
import pickle
from enum import EnumType
from pathlib import Path
from typing import Any

from rlhf import texts
from rlhf.errors import UserError

# What the pickle of the metadata may name.
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
# megatron-core 0.15 and earlier derived two of them.
OLDER = {
    ("megatron.core.dist_checkpointing.strategies.torch", f"MCore{name}"): (module, name)
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
    )
}


class Metadata(pickle.Unpickler):
    """Reads the metadata's pickle, and refuses what it should not ask for."""

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
        """What the file's getattr gives: nothing but the members of the enums in ALLOWED.

        Some releases of Python 3.11 (Debian's 3.11.2 is one) pickle such a member as getattr(enum, name), others as
        enum(value).
        """
        if type(owner) is not EnumType or not isinstance(name, str) or name not in owner.__members__:
            raise self.distrust(f"getattr({owner!r}, {name!r})")
        return owner.__members__[name]

    def distrust(self, asked: str) -> UserError:
        what = f"it asks for {asked}, and only shapes and offsets are read"
        return UserError(f"{self.path}: {what}: do not trust this file")
