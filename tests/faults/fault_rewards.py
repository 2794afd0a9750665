"""Reward functions of the fault tests, found on PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

from tests.loop.loop_rewards import by_hash

SPIN_FILE = "LENS_TEST_SPIN_FILE"


def spins(response: str, answer: str, source: str) -> float:
    while True:
        pass


def spins_when_told(response: str, answer: str, source: str) -> float:
    """From the moment on when the file that SPIN_FILE names is there."""
    return (
        spins(response, answer, source) if Path(os.environ[SPIN_FILE]).exists() else by_hash(response, answer, source)
    )
