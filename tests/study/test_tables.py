"""The tables of the parts beside the main study, and those in the paper's form, on runs whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.study import beside, paper_tables, tables
from examples.study.analysis import PRIMARY, Run, load_runs
from examples.study.collect import DATA
from examples.study.tables import SETS


def level(arm: str, seed: int, height: float, steps: int = 60, **more: float) -> Run:
    """Held-out success `height` from the first step on, on every set."""
    rows = []
    for step in range(steps + 1):
        row = {"step": step, **({} if step == 0 else more)}
        if step % 5 == 0:
            row |= {f"eval/{name}": height for name in SETS}
        rows.append(row)
    return Run(arm, seed, tuple(rows))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_best_and_second_best_and_the_paired_gain() -> None:
    runs = {
        "grpo": {0: level("grpo", 0, 0.5), 1: level("grpo", 1, 0.7), 2: level("grpo", 2, 0.9)},
        "lens": {0: level("lens", 0, 0.6), 1: level("lens", 1, 0.8)},  # 0.1 better than GRPO's runs of seeds 0 and 1
        "dapo": {0: level("dapo", 0, 0.2)},
    }
    table = cells(paper_tables.ends(runs, {arm: arm for arm in ("grpo", "dapo", "greso", "lens")}, "Model"))
    assert [row[0] for row in table] == ["grpo", "dapo", "lens"]  # greso has not run
    grpo, dapo, lens = table
    assert grpo[2] == lens[2] == "**70.00**"  # equal, both best
    assert dapo[2] == "<u>20.00</u>" and [row[1] for row in table] == ["3", "1", "2"]
    assert lens[-1].startswith("+10.00 [+10.00, +10.00]") and dapo[-1] == "-30.00" and grpo[-1] == "–"


def test_costs_of_a_step_relative_to_the_same_seeds(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(
        'study,arm,seed,set\nmain,grpo,0,"seed=0"\nmain,grpo_extended,0,"seed=0 rollout.n=16"\n'
    )
    costs = {"time/step": 2.5, "time/eval": 0.5, "tokens": 100.0, "sampling/original_rollouts": 128.0}
    double = {**{name: 2 * value for name, value in costs.items()}, "time/step": 4.0}
    runs = {
        "grpo": {0: level("grpo", 0, 0.5, **costs), 1: level("grpo", 1, 0.5, **{**costs, "tokens": 7.0})},
        "grpo_extended": {0: level("grpo_extended", 0, 0.5, **double)},
    }
    grpo, extended = cells(paper_tables.step_costs(runs, tmp_path))
    assert grpo[2:] == ["8", "2.00", "1.00x", "1.00x", "1.00x"]
    assert extended[2:] == ["16", "3.00", "2.00x", "2.00x", "1.50x"]


def test_tuning_reads_the_pilot_up_to_the_studys_steps() -> None:
    def run(first: float, then: float) -> Run:
        at = {step: first if step <= 45 else then for step in range(0, 61, 5)}
        return Run("", 100, tuple({"step": step, PRIMARY: value} for step, value in at.items()))

    pilot = {"lr 5e-05": {100: run(0.9, 0.9)}, "lr 0.0001": {100: run(0.3, 1.0)}, "lr 0.0002": {100: run(0.4, 0.0)}}
    tune = {
        "grpo lr 0.0004": {100: run(0.2, 0.2)},
        **{
            f"lens lr {rate}": {100: run(value, 0.0)} for rate, value in zip(beside.RATES, (0.1, 0.2, 0.6), strict=True)
        },
        "random lr 0.0001": {100: run(0.1, 0.1)},
    }
    assert beside.by_rate(tune, pilot)["grpo"] == pytest.approx({"0.0001": 0.3, "0.0002": 0.4, "0.0004": 0.2})
    table = {row[0]: row[1:] for row in cells(beside.tuning(tune, pilot))}
    assert table["grpo"] == ["0.300", "**0.400**", "0.200"] and table["lens"] == ["0.100", "0.200", "**0.600**"]
    assert table["random"] == ["0.100", "–", "–"]  # not all of its rates have run: none is its best
    against = {row[0]: row[1:] for row in cells(beside.tuned_contrasts(tune, pilot))}
    assert against["lens - grpo"] == ["-0.200", "-0.200", "+0.400", "+0.200"]
    assert against["lens - random"] == ["+0.000", "–", "–", "–"]


def test_steps_to_the_peak_of_another_measure() -> None:
    """GRPO's credit rises to its height in 40 steps, the arm's in 20; final answers would say that it never gets there."""

    def rising(arm: str, steps: float, whole: float) -> Run:
        at = range(0, 61, 5)
        return Run(arm, 0, tuple({"step": s, "eval/graded": min(1, s / steps), PRIMARY: whole} for s in at))

    runs = {"grpo": {0: rising("grpo", 40, 0.9)}, "lens": {0: rising("lens", 20, 0.1)}}
    table = {row[0]: row[1:] for row in cells(tables.peak_table(runs, ["grpo", "lens"], "eval/graded"))}
    # smoothed over three evaluations: the whole height is reached one evaluation after the corner
    assert table["grpo"][:3] == ["1", "1.00", "0 of 1"] and table["lens"][:3] == ["1", f"{45 / 25:.2f}", "0 of 1"]
    assert cells(tables.peak_table(runs, ["lens"]))[0][3] == "1 of 1"
    half = {row[0]: row[1:] for row in cells(tables.peak_table(runs, ["grpo", "lens"], "eval/graded", part=0.5))}
    assert half["grpo"][1] == "1.00" and half["lens"][1:3] == ["2.00", "0 of 1"]  # in 10 steps instead of 20


def test_parts_without_data_say_so(tmp_path: Path) -> None:
    assert load_runs(tmp_path, "graded") == {}
    blocks = beside.blocks(tmp_path, {})
    for name in blocks.keys() - {"tasks-base"}:
        assert blocks[name]() == "No run has these values yet.", name


def test_differences_of_the_committed_runs_computed_another_way() -> None:
    runs = load_runs(DATA / beside.FOLDER, "graded")
    for arm, against in (("lens", "grpo"), ("lens", "resample")):
        shared = sorted(runs.get(arm, {}).keys() & runs.get(against, {}).keys())
        table = beside.differences(runs, [(arm, against)], {"end": lambda run: run.values(beside.CREDIT)[-1]})
        if not shared:
            assert table == "No run has these values yet."
            continue
        ends = [[runs[name][seed].rows[-1][beside.CREDIT] for seed in shared] for name in (arm, against)]
        own = sum(a - b for a, b in zip(*ends, strict=True)) / len(shared)
        (row,) = cells(table)
        assert row[1] == str(len(shared)) and float(row[2].split()[0]) == pytest.approx(own, abs=6e-4)
