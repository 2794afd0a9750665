"""The study's numbers on runs whose answers are known, and the page against the data it was made from."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from statistics import mean

import pytest

from examples.study import analysis, report, tables
from examples.study.analysis import PRIMARY, Run
from examples.study.collect import DATA, collect_tables


def ramp(arm: str, seed: int, peak_at: float, height: float = 0.8, steps: int = 60, **more: float) -> Run:
    """Held-out success rises in a straight line to `height` at `peak_at` and stays there; evaluated every 5 steps."""
    rows = []
    for step in range(steps + 1):
        row = {"step": step, **({} if step == 0 else more)}
        if step % 5 == 0:
            row[PRIMARY] = min(1.0, step / peak_at) * height
        rows.append(row)
    return Run(arm, seed, tuple(rows))


def test_an_arm_twice_as_fast() -> None:
    # centred means leave straight lines where they are, except at the ends
    slow = Run("grpo", 0, tuple({"step": s, PRIMARY: s / 100, "tokens": 10.0} for s in range(0, 61)))
    fast = Run("lens", 0, tuple({"step": s, PRIMARY: s / 50, "tokens": 30.0} for s in range(0, 61)))
    runs = {"grpo": {0: slow}, "lens": {0: fast}}
    (reached,) = analysis.reach_peak(runs, "lens")
    assert reached.baseline_step == 60 and not reached.censored
    assert reached.step == pytest.approx(59.5 / 2)  # the last smoothed point is a mean of two: 0.595
    speed = analysis.log_speed([reached])
    assert speed is not None and speed.mean == pytest.approx(math.log(60 / 29.75))
    assert analysis.cost_to_peak(runs, "lens", "tokens") == pytest.approx(29.75 * 30 / (60 * 10))
    assert analysis.cost_to_peak(runs, "grpo", "tokens") == pytest.approx(1.0)


def test_an_arm_that_never_gets_there_is_censored_at_the_end() -> None:
    runs = {"grpo": {0: ramp("grpo", 0, 30)}, "weak": {0: ramp("weak", 0, 30, height=0.4)}}
    (reached,) = analysis.reach_peak(runs, "weak")
    assert reached.censored and reached.step == 60


def test_pairs_are_by_seed_and_seeds_without_a_partner_left_out() -> None:
    rng = random.Random(0)
    level = {seed: rng.random() / 2 for seed in range(6)}
    runs = {
        "a": {seed: ramp("a", seed, 1e-9, height=level[seed] + 0.1) for seed in range(5)},
        "b": {seed: ramp("b", seed, 1e-9, height=level[seed]) for seed in range(1, 6)},
    }
    found = analysis.paired(runs, "a", "b", analysis.end)
    assert found is not None and found.pairs == 4
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1, abs=1e-9)  # the seeds' own levels cancel
    alone = analysis.over_seeds(runs["a"], analysis.end)
    assert alone is not None and alone.low is not None and alone.mean - alone.low > 0.1
    assert analysis.paired(runs, "a", "nobody", analysis.end) is None


def test_phases_weights_and_costs_by_hand() -> None:
    rows = [{"step": 0, PRIMARY: 0.1}]
    rows += [
        {"step": s, "x": float(s), "purified_ratio": 0.5 if s <= 2 else 0.0, "tokens": 2.0 * s} for s in range(1, 10)
    ]
    run = Run("a", 0, tuple(rows))
    assert analysis.by_phase(run, "x") == {"early": 2.0, "middle": 5.0, "late": 8.0}
    assert analysis.weighted(run, "x") == pytest.approx(1.5)  # steps 1 and 2, alike
    assert analysis.weighted(run, "absent") is None
    assert run.cost_until(3, analysis.tokens) == 12.0
    assert run.cost_until(2.5, analysis.tokens) == 9.0
    assert run.cost_until(99, analysis.tokens) == sum(2.0 * s for s in range(1, 10))
    assert analysis.end(ramp("a", 0, 1e-9)) == pytest.approx(0.8)


def test_bands_take_the_steps_that_all_seeds_have() -> None:
    runs = {seed: ramp("a", seed, 1e-9, height=h, steps=40 if seed else 60) for seed, h in enumerate((0.2, 0.4, 0.6))}
    band = analysis.band(runs, PRIMARY)
    assert [step for step, *_ in band] == [float(s) for s in range(0, 41, 5)]
    _, middle, low, high = band[-1]
    reach = 4.302653 * 0.2 / math.sqrt(3)  # t(0.975, 2) s / sqrt(n)
    assert (middle, low, high) == (pytest.approx(0.4), pytest.approx(0.4 - reach), pytest.approx(0.4 + reach))


def test_blocks_replace_what_stands_between_their_marks() -> None:
    page = "a\n<!-- study:one -->\nold\n<!-- /study -->\nb\n<!-- study:two -->\n<!-- /study -->\n"
    filled = report.fill(page, {"one": lambda: "new", "two": lambda: "x"})
    assert filled == "a\n<!-- study:one -->\n\nnew\n\n<!-- /study -->\nb\n<!-- study:two -->\n\nx\n\n<!-- /study -->\n"
    assert report.fill(filled, {"one": lambda: "new", "two": lambda: "x"}) == filled
    with pytest.raises(KeyError):
        report.fill("<!-- study:typo -->\n<!-- /study -->", {})


def test_the_page_and_its_figures_are_those_of_the_committed_data(tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    page.write_text(report.MARKED.sub(r"\1\3", report.PAGE.read_text()))  # emptied
    report.report(DATA, page, tmp_path / "img")
    assert page.read_text() == report.PAGE.read_text()
    made = {path.name: path.read_text() for path in (tmp_path / "img").iterdir()}
    assert made == {path.name: path.read_text() for path in report.IMAGES.iterdir()}
    assert set(tables.MAIN) & set(analysis.load_runs(DATA)) or not analysis.load_runs(DATA)


def test_numbers_of_the_page_computed_another_way() -> None:
    """The primary contrast from the parquet file with a loop of its own."""
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(DATA / "steps.parquet").to_pylist() if row["study"] == "main"]
    heights: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row[PRIMARY] is not None:
            heights.setdefault((row["arm"], row["seed"]), {})[row["step"]] = row[PRIMARY]
    runs = analysis.load_runs(DATA)
    for against in tables.AGAINST:
        seeds = [seed for arm, seed in heights if arm == "lens" and (against, seed) in heights]
        found = analysis.paired(runs, "lens", against, analysis.area)
        assert (found is None) == (not seeds)
        if found is None:
            continue

        def area(curve: dict[int, float]) -> float:  # evenly spaced points: the ends count half
            values = [curve[step] for step in sorted(curve)]
            return (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)

        own = mean(area(heights["lens", seed]) - area(heights[against, seed]) for seed in seeds)
        assert found.pairs == len(seeds) and found.mean == pytest.approx(own, abs=1e-6)


def test_collecting_elsewhere_keeps_what_others_ran(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    before = (tmp_path / "data" / "runs.csv").read_text()
    count = collect_tables({}, tmp_path / "data")  # a machine with no runs of its own
    assert (tmp_path / "data" / "runs.csv").read_text() == before
    assert count == len(before.splitlines()) - 1
    assert analysis.load_runs(tmp_path / "data") == analysis.load_runs(DATA)
