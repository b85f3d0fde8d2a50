"""Replaces private names of other packages. A name that the installed version does not have is an error.

rlhf/model/megatron_private.py and rlhf/rollout/vllm_private.py contain all such names, except those that let
megatron-core run on a CPU. These are in rlhf/parallel/cpu.py.
"""

import inspect
from importlib import metadata
from types import ModuleType
from typing import Any

from rlhf.errors import UserError

REMEDY = "install the version in requirements/"


def replace(owner: Any, name: str, new: Any) -> None:
    """Set an attribute of a module, class or object. Raises UserError if there is no attribute with this name."""
    require(owner, name)
    setattr(owner, name, new)


def define(module: ModuleType, name: str, new: Any) -> None:
    """Set the name of an optional package that a module imports. Raises UserError unless the module uses this name."""
    if f"{name}." not in inspect.getsource(module):
        raise _missing(module, f"use of {name}")
    setattr(module, name, new)


def require(owner: Any, *names: str) -> None:
    """Raise UserError unless a module, class or object has attributes of these names."""
    for name in names:
        if not hasattr(owner, name):
            raise _missing(owner, name)


def _missing(owner: Any, what: str) -> UserError:
    """Return an error that names the package, its version and the module, class or object."""
    kind = owner if hasattr(owner, "__name__") else type(owner)
    dotted = ".".join(filter(None, (getattr(kind, "__module__", ""), kind.__name__)))
    packages = metadata.packages_distributions().get(dotted.partition(".")[0], [])
    version = "".join(f"{package} {metadata.version(package)}: " for package in packages[:1])
    return UserError(f"{version}{dotted} has no {what}, but rlhf replaces or reads it: {REMEDY}")
