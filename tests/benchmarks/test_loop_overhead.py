"""benchmarks/loop_overhead.py on a few prompts: the whole loop runs, and every section of the profile is met."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks._profile import Profile
from benchmarks.loop_overhead import NOT_THE_LOOPS_OWN, measure, sections, table

PROMPTS, N, TOKENS = 8, 4, 24


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_section_has_its_own_time_only() -> None:
    profile = Profile()
    with profile.section("outer"):
        burn(0.02)
        with profile.section("inner"):
            burn(0.05)
    assert profile.cpu["inner"] == pytest.approx(0.05, abs=0.01)
    assert profile.cpu["outer"] == pytest.approx(0.02, abs=0.01)


def test_a_small_step(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(measure, PROMPTS, N, TOKENS, 1, tmp_path).result()
    assert PROMPTS * N < found.rollouts <= 2 * PROMPTS * N  # some prompts, not all, were rescued
    assert found.tokens == found.rollouts * TOKENS
    assert 0 < found.seconds < 30
    met = {name for name, seconds in found.profile.items() if seconds > 0}
    assert set(sections()) <= met
    counted = sum(seconds for name, seconds in found.profile.items() if name not in NOT_THE_LOOPS_OWN)
    assert counted == pytest.approx(found.seconds, rel=1e-6)
    assert f"| {found.rollouts:,} |" in table([found])
