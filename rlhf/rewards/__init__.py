"""What responses are worth: function(prompt: str, response: str, record: dict) -> float, one of REWARDS or the user's own."""

from rlhf.rewards.worker import REWARDS, Rewards, Score, check

__all__ = ["REWARDS", "Rewards", "Score", "check"]
