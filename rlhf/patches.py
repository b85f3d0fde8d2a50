"""Changes to names that a package does not promise to keep. A name that the installed version lacks is refused.

All such names are in rlhf/model/megatron_private.py and rlhf/rollout/vllm_private.py; rlhf/parallel/cpu.py has those
that let megatron-core run on a CPU.
"""

import inspect
from importlib import metadata
from types import ModuleType
from typing import Any

from rlhf.errors import UserError

REMEDY = "install the version in requirements/"


def replace(owner: Any, name: str, new: Any) -> None:
    """Give an attribute of a module, class or object another value. Raises UserError if it has none of that name."""
    require(owner, name)
    setattr(owner, name, new)


def define(module: ModuleType, name: str, new: Any) -> None:
    """Stand in for an optional package that a module imports. Raises UserError unless the module uses it."""
    if f"{name}." not in inspect.getsource(module):
        raise _missing(module, f"use of {name}")
    setattr(module, name, new)


def require(owner: Any, *names: str) -> None:
    """Raise UserError unless a module, class or object has attributes of these names."""
    for name in names:
        if not hasattr(owner, name):
            raise _missing(owner, name)


def _missing(owner: Any, what: str) -> UserError:
    """Names the package, its version and the module, class or object."""
    kind = owner if hasattr(owner, "__name__") else type(owner)
    dotted = ".".join(filter(None, (getattr(kind, "__module__", ""), kind.__name__)))
    packages = metadata.packages_distributions().get(dotted.partition(".")[0], [])
    version = "".join(f"{package} {metadata.version(package)}: " for package in packages[:1])
    return UserError(f"{version}{dotted} has no {what}, which is replaced or read here: {REMEDY}")
