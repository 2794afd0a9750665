"""Reward functions of the fault tests, found on PYTHONPATH."""

from __future__ import annotations


def spins(response: str, answer: str, source: str) -> float:
    while True:
        pass
