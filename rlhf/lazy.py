"""numpy and torch, imported when something of theirs is first used.

An algorithm's file also says what `--help` and `--dry-run` need to know of it, and those work where neither is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
else:

    class Lazy:
        """Stands for a module of this name."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, attribute: str) -> Any:
            value = getattr(import_module(self.__name__), attribute)
            setattr(self, attribute, value)  # the next use is an ordinary look-up
            return value

    np, torch, F = Lazy("numpy"), Lazy("torch"), Lazy("torch.nn.functional")

__all__ = ["F", "np", "torch"]
