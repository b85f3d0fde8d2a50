"""The table of algorithms: mode -> class. A new one is a module of a page and a line here (and its name in config.MODES)."""

from collections.abc import Callable

from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.sft import SFT
from rlhf.config import Config
from rlhf.contracts import Algorithm

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {"sft": SFT, "grpo": GRPO}
