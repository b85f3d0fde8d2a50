"""The table of algorithms: mode -> class. A new one is a module of a page and a line here (and its name in config.MODES)."""

from collections.abc import Callable

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.reward import RM
from rlhf.algorithms.sft import SFT
from rlhf.config import Config
from rlhf.contracts import Algorithm

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {
    "sft": SFT,
    "reward": RM,
    "rlhf": PPO,
    "dpo": DPO,
    "online-dpo": OnlineDPO,
    "grpo": GRPO,
}
