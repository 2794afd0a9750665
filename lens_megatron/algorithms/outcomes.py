"""What a reward says: success, success rate, and whether a group can teach anything.

Rewards are in [0, 1]. For 0/1 rewards these are the papers' words. For graded rewards:
  success        the reward reaches the threshold; partial credit below it is a failure;
  acc(x)         the share of successes, never the mean reward: tau and the benefit check compare shares;
  zero variance  all *rewards* are equal, not all successes: a group of failures with different partial credit has an
                 advantage, and so a signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

# What tells whether a group can teach anything. spread: its rewards differ.  original: one of them differs from the mean
# of Y (an all-success rescue's do).  any: nobody can tell from rewards alone.
LearnsFrom = Literal["spread", "original", "any"]

# Far below any difference that a verifier means, far above the rounding of a sum of rewards. A std compared with 0
# would not do: that of eight rewards of 0.1 is not exactly 0 in floating point.
SAME_REWARD = 1e-6


def is_success(reward: float, threshold: float) -> bool:
    return reward >= threshold - SAME_REWARD


def success_count(rewards: Sequence[float], threshold: float) -> int:
    return sum(is_success(reward, threshold) for reward in rewards)


def zero_variance(rewards: Sequence[float]) -> bool:
    """No reward differs from another: a mean-centred advantage is 0 for all, whatever the weights."""
    return not rewards or max(rewards) - min(rewards) <= SAME_REWARD
