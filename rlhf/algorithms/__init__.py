"""The table of modes. A new one is a module of a page in this folder and a line here; everything else about it is said on its class.

The modules import the standard library and light parts of this package only (numpy and torch by rlhf.lazy), so that help is quick and works
where nothing is installed.
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
}


def _load(place: str) -> type[Algorithm]:
    module, _, name = place.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)


ALGORITHMS: dict[str, type[Algorithm]] = {mode: _load(place) for mode, place in MODES.items()}
ALIASES = {alias: mode for mode, algorithm in ALGORITHMS.items() for alias in algorithm.aliases}
SECTIONS = dict(algorithm.section for algorithm in ALGORITHMS.values() if algorithm.section)  # of the configuration: name -> keys
