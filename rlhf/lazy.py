"""numpy and torch, imported at their first use.

`--help` and `--dry-run` import the algorithms and must work without numpy and torch.
"""

from importlib import import_module
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

__all__ = ["F", "np", "torch"]
