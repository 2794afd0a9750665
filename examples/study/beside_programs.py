"""Tables of the list programs: the second task, where the base model hardly ever gets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from examples.study import analysis
from examples.study.analysis import Run, Runs, load_runs
from examples.study.beside import FOLDER, lost_signal
from examples.study.tables import (
    NOTHING,
    Numbers,
    deletion,
    differences,
    levels,
    markdown,
    peak_table,
    pilot_table,
    share,
    signal,
    transfer,
)

DECOY, PLAIN = "eval/decoy", "eval/plain"
ARMS = (
    *("grpo", "resample", "resample_plus", "random", "lens", "lens_plus", "lens_before"),
    *("gamma_1", "gamma_1_keep", "gamma_1_plus", "gamma_1_no_ratio"),
    *("oracle", "oracle_keep", "oracle_plus", "oracle_no_ratio"),
)
DRAWN = ("grpo", "resample", "lens", "gamma_1", "gamma_1_no_ratio", "oracle", "oracle_no_ratio")
PAIRS = (
    *((arm, "grpo") for arm in ARMS[1:]),
    *((arm, "resample") for arm in ("lens", "gamma_1", "gamma_1_no_ratio")),
    *(("gamma_1_no_ratio", arm) for arm in ("resample_plus", "gamma_1_plus", "lens")),
    ("oracle_no_ratio", "resample_plus"),
    *(("gamma_1_plus", "gamma_1_keep"), ("gamma_1_keep", "gamma_1"), ("gamma_1", "lens")),
    *(
        ("lens_before", "lens"),
        ("lens", "random"),
        ("oracle_keep", "oracle"),
        ("oracle_plus", "oracle_keep"),
        ("oracle_no_ratio", "oracle_plus"),
    ),
)
STEPS = 48  # of the runs; GRPO's pilot took more


def blocks(data: Path) -> dict[str, Callable[[], str]]:
    runs = load_runs(data / FOLDER, "programs")
    there = [arm for arm in ARMS if arm in runs]
    rolling_again = [arm for arm in there if arm != "grpo"]
    numbers: dict[str, Numbers] = {
        "area, decoy": lambda run: analysis.area(run, DECOY),
        "end, decoy": lambda run: analysis.end(run, DECOY),
        "end, plain": lambda run: analysis.end(run, PLAIN),
    }
    return {
        "programs-base": lambda: base(data),
        "programs-pilot": lambda: pilot_table(pilots(runs), DECOY),
        "programs": lambda: levels(runs, there, numbers),
        "programs-contrasts": lambda: differences(runs, PAIRS, numbers),
        "programs-peak": lambda: peak_table(runs, there, DECOY),
        "programs-half": lambda: peak_table(runs, there, DECOY, part=0.5),
        "programs-failing": lambda: failing(runs, there),
        "programs-lost": lambda: lost_signal(runs, there),
        "programs-deletion": lambda: deletion(runs, rolling_again),
        "programs-signal": lambda: signal(runs, rolling_again),
        "programs-transfer": lambda: transfer(runs, rolling_again),
    }


def base(data: Path) -> str:
    rows = []
    for name, title in (("before", "before the noise: the reference of `lens_before`"), ("base", "base model")):
        path = data / f"{name}_programs.json"
        if not path.exists():
            return NOTHING
        sets = json.loads(path.read_text(encoding="utf-8"))["models"][0]["benchmarks"]
        for split, what in (
            ("decoy", "a strong decoy, p(x)"),
            ("purified", "the same without it, p(x')"),
            ("weak", "a weak decoy"),
            ("plain", "no decoy"),
        ):
            one = sets[split]
            low, high = one["interval"]
            none = 1 - one["pass_at"][str(one["samples"])]
            rows.append(
                (title, what, str(one["problems"]), f"{one['average']:.3f} [{low:.3f}, {high:.3f}]", share(none))
            )
    return markdown(("model", "held-out set", "prompts", "success", "zero-reward ratio at n = 8"), rows)


def pilots(runs: Runs) -> Runs:
    found = {arm.removeprefix("pilot "): seeds for arm, seeds in runs.items() if arm.startswith("pilot ")}
    return {rate: {seed: run.until(STEPS) for seed, run in seeds.items()} for rate, seeds in found.items()}


def failing(runs: Runs, arms: list[str]) -> str:
    """Prompts whose rollouts all fail, by thirds of the run: what a rescue is for."""
    rows = []
    for arm in arms:
        shown = []
        for phase in analysis.PHASES:

            def number(run: Run, phase: str = phase) -> float | None:
                return analysis.by_phase(run, "zero_reward_ratio").get(phase)

            one = analysis.over_seeds(runs[arm], number)
            shown.append(share(one.mean if one else None, 2))
        rows.append((arm, str(len(runs[arm])), *shown))
    return markdown(("arm", "seeds", *analysis.PHASES), rows)
