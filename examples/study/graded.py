"""Partial credit for the study's stories, as a reward function of the user's own (docs/rewards.md)."""

from __future__ import annotations

import re


def score(response: str, answer: str, source: str) -> float:
    """The share of counts that are right before the first mistake. `answer`: the count after each step; the boxed answer
    is one more, and counts only where every step was written out. 1 for a solution without a mistake."""
    right = answer.split()
    told = re.findall(r"= (\d+)", response)
    boxed = re.findall(r"\\boxed\{\s*(\d+)\s*\}", response)
    answered = boxed[-1:] if len(told) == len(right) else []  # neither after too few steps nor after too many
    told = [*told[: len(right)], *answered]
    wanted = [*right, right[-1]]
    reached = 0
    while reached < min(len(told), len(wanted)) and told[reached] == wanted[reached]:
        reached += 1
    return reached / len(wanted)
