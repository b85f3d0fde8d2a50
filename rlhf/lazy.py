"""numpy and torch, imported at their first use, and a check for packages that may be missing.

`--help` and `--dry-run` import the algorithms and must work without numpy and torch.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
else:

    class Lazy:
        """A proxy that imports the module of this name at the first use of an attribute."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(import_module(self.__name__), attribute)
            setattr(self, attribute, value)  # the next use does not call __getattr__
            return value

    np, torch, F = Lazy("numpy"), Lazy("torch"), Lazy("torch.nn.functional")


def package(name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None if it is not installed."""
    found = find_spec(name)
    # A folder of this name in the current folder, such as that of wandb's files, has no origin, and is no package.
    return Path(found.origin).parent if found and found.origin else None


__all__ = ["F", "np", "package", "torch"]
