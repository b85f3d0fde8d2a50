"""The reward functions that are part of the package, and the choice of those of a run."""

from collections.abc import Callable
from typing import Any

from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.rewards import answers


def verify(prompt: str, response: str, record: dict[str, Any]) -> float:
    """Return 1.0 if the response states the record's answer, or one of a list of answers, else 0.0."""
    if "answer" not in record:
        missing = "reward.function='math' needs the key 'answer' in each record, but a record has none"
        raise UserError(f"{missing}: add it, or set another function")
    right = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    return max((answers.verify(response, str(answer)) for answer in right), default=0.0)


REWARDS: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "math": verify,  # its time is bounded, so it needs no worker process
}


def rule(config: Config) -> tuple[str, ...]:
    """Return the reward functions of samples. There are none if only a reward model or an environment gives rewards."""
    return config.reward.function or (() if config.reward.load or config.rollout.environment else ("math",))
