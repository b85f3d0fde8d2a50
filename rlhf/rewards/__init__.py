"""Reward functions and environments.

A reward function is one of REWARDS or the user's own: function(prompt: str, response: str, record: dict) -> float.
An environment is a class of the user that answers the turns of a response.
"""

from rlhf.rewards.worker import REWARDS, Environments, Pool, Reply, Rewards, Score, check

__all__ = ["REWARDS", "Environments", "Pool", "Reply", "Rewards", "Score", "check"]
