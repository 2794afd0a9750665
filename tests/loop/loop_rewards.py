"""Reward functions for runs of a random model: answers mean nothing to it, and rewards must still differ."""

from __future__ import annotations

import time
from zlib import crc32


def by_hash(response: str, answer: str, source: str) -> float:
    """One response in three is right, always the same ones."""
    return float(crc32(f"{answer}|{response}".encode()) % 3 == 0)


_judged = 0


def tires(response: str, answer: str, source: str) -> float:
    """Breaks in the middle of a run."""
    global _judged
    _judged += 1
    if _judged > 40:
        raise ValueError("the judge is tired")
    return by_hash(response, answer, source)


def slowly(response: str, answer: str, source: str) -> float:
    time.sleep(0.05)
    return by_hash(response, answer, source)
