"""The table of modes. To add a mode, write a module in this folder and add a line here. Its class declares the rest.

The modules import only the standard library and light parts of this package. They get numpy and torch from rlhf.lazy.
So `--help` is fast and works where neither is installed.
"""

from importlib import import_module

from rlhf.contracts import Algorithm

MODES = {  # mode -> module in this folder, and class
    "sft": "sft.SFT",
    "reward": "reward.RM",
    "rlhf": "ppo.PPO",
    "dpo": "dpo.DPO",
    "online-dpo": "online_dpo.OnlineDPO",
    "grpo": "grpo.GRPO",
    "evaluate": "evaluate.Evaluate",
    "mtbench": "mtbench.MTBench",
}


def _load(place: str) -> type[Algorithm]:
    module, _, name = place.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


ALGORITHMS: dict[str, type[Algorithm]] = {mode: _load(place) for mode, place in MODES.items()}
ALIASES = {alias: mode for mode, algorithm in ALGORITHMS.items() for alias in algorithm.aliases}
# name of a section in the configuration -> dataclass of its keys
SECTIONS = dict(algorithm.section for algorithm in ALGORITHMS.values() if algorithm.section)
