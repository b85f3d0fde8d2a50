"""Reward functions and environments.

A reward function is one of REWARDS or the user's own: function(prompt: str, response: str, record: dict) -> float.
It may be async, return a dict of named parts, or take lists of prompts, responses and records. An environment is a
class of the user that answers the turns of a response.
"""

from rlhf.rewards.environments import Environments, Reply
from rlhf.rewards.functions import Rewards, Score
from rlhf.rewards.rules import REWARDS, rule
from rlhf.rewards.worker import Pool, check

__all__ = ["REWARDS", "Environments", "Pool", "Reply", "Rewards", "Score", "check", "rule"]
