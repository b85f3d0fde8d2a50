"""The table of algorithms: mode -> class. A new one is a module of a page and a line here (and its name in config.MODES)."""

from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.sft import SFT

ALGORITHMS = {"sft": SFT, "grpo": GRPO}
