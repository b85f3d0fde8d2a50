"""What responses are worth: function(prompt: str, response: str, record: dict) -> float, one of REWARDS or the user's own; and what answers
their turns: the user's environments.
"""

from rlhf.rewards.worker import REWARDS, Environments, Pool, Reply, Rewards, Score, check

__all__ = ["REWARDS", "Environments", "Pool", "Reply", "Rewards", "Score", "check"]
