"""Reward functions for runs of a random model: answers mean nothing to it, and rewards must still differ."""

from __future__ import annotations

import os
import time
from pathlib import Path
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


def broken(response: str, answer: str, source: str) -> float:
    raise ValueError("the judge is broken")


def slowly(response: str, answer: str, source: str) -> float:
    time.sleep(0.05)
    return by_hash(response, answer, source)


def until_noticed(response: str, answer: str, source: str) -> float:
    """In a job's first life, waits for the announcement of its time limit: Slurm looks at limits twice a minute."""
    notice = Path(os.environ["LENS_MEGATRON_NOTICE"])  # launch/notice.JOB.LIFE
    while notice.suffix == ".0" and not notice.exists():
        time.sleep(0.05)
    return slowly(response, answer, source)
