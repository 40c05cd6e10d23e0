"""Outcome rewards: responses and their rows in, numbers in [0, 1] out, computed in killable worker processes."""

from prime_fast.rewards.functions import row_check
from prime_fast.rewards.pool import RewardPool, score

__all__ = ["RewardPool", "row_check", "score"]
