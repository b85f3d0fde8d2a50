"""Changes to names that a package does not promise to keep. A name that the installed version does not have is refused at once.

rlhf/model/megatron_private.py and rlhf/rollout/vllm_private.py hold all such names, rlhf/parallel/cpu.py those that a CPU needs.
"""

from importlib import metadata
from typing import Any

from rlhf.errors import UserError

REMEDY = "install the version in requirements/"


def replace(owner: Any, name: str, new: Any) -> None:
    """Give an attribute of a module, class or object another value. Raises UserError, as require() does."""
    require(owner, name)
    setattr(owner, name, new)


def require(owner: Any, *names: str) -> None:
    """Raise UserError unless a module, class or object has attributes of these names."""
    for name in names:
        if not hasattr(owner, name):
            raise UserError(f"{_where(owner)} has no {name}, which is used here: {REMEDY}")


def _where(owner: Any) -> str:
    """The package and version of a module, class or object, and its name."""
    kind = owner if hasattr(owner, "__name__") else type(owner)
    dotted = ".".join(filter(None, (getattr(kind, "__module__", ""), kind.__name__)))
    found = metadata.packages_distributions().get(dotted.partition(".")[0], [])
    return " ".join([*(f"{package} {metadata.version(package)}:" for package in found[:1]), dotted])
