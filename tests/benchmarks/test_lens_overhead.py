"""benchmarks/lens_overhead.py, small: what is compared is comparable."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks._simulated_engine import SimulationConfig
from benchmarks.lens_overhead import (
    VARIANTS,
    Embedded,
    Simulated,
    Turn,
    compare_simulated,
    embedded_table,
    run_embedded,
    step_ratio,
    summary,
)
from tests.loop.runs import write_task


@pytest.fixture(scope="module")
def simulated() -> dict[str, Simulated]:
    return compare_simulated(SimulationConfig(servers=2, slots_per_server=64), prompts=12, n=4, seeds=1)


def test_grpo_is_the_unit(simulated: dict[str, Simulated]) -> None:
    grpo = simulated["grpo"]
    assert (grpo.generation, grpo.rest, grpo.wasted_share, grpo.purified_ratio) == (1, 1, 0, 0)
    assert [step_ratio(grpo, share) for share in (0.0, 0.3, 1.0)] == pytest.approx([1, 1, 1])
    assert simulated["grpo_extended"].rest == pytest.approx(2, rel=0.2)
    assert simulated["grpo_extended"].generation > 1


def test_a_schedule_changes_when_and_never_what(simulated: dict[str, Simulated]) -> None:
    lens = [one for name, one in simulated.items() if name.startswith("lens") and "visit" not in name]
    assert len(lens) == 3
    assert len({one.purified_ratio for one in lens}) == len({one.rest for one in lens}) == 1
    assert 0 < lens[0].purified_ratio < 1
    after_group, early, speculative = (one.generation for one in lens)
    assert min(after_group, early) > speculative > 1
    assert [one.wasted_share > 0 for one in lens] == [False, False, True]


def test_ratios_are_taken_within_a_round() -> None:
    def turn(name: str, seconds: float) -> Turn:
        return Turn(name, seconds, seconds / 2, seconds / 4, {"generate": seconds / 2}, 10 * seconds, seconds, 0.5)

    rounds = [{"grpo": turn("grpo", slow), "lens early": turn("lens early", 1.5 * slow)} for slow in (1.0, 9.0, 2.0)]
    found = summary(rounds)["lens early"]
    assert found == Embedded(1.5, 1.5, 1.5, 1.5, 1.5, 0.1, 0.5, 3.0, pytest.approx(2 / 3))
    assert "| lens early | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 10% | 50% | 1.27-1.56 |" in embedded_table(
        summary(rounds)
    )


@pytest.mark.long
def test_algorithms_take_turns_on_the_embedded_engine(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    settings = {"rounds": 1, "warm_up": 1, "prompts": 3, "n": 2, "slots": 8, "tau": 0.5}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        (turns,) = pool.submit(run_embedded, task / "model", task / "train.jsonl", tmp_path, **settings).result()
    assert list(turns) == [variant.name for variant in VARIANTS]
    grpo, extended, *lens = turns.values()
    assert grpo.purified_ratio == extended.purified_ratio == 0 == grpo.wasted_tokens
    assert extended.tokens > 1.3 * grpo.tokens  # a random model's responses differ in length
    assert all(one.purified_ratio > 0 and one.tokens > grpo.tokens for one in lens)
    assert all(one.engine_cpu > 0 and one.trainer_cpu > 0 and one.seconds > 0 for one in turns.values())
