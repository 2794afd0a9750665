"""The study in the form of the paper's Tables 1, 4, 5 and 6, and of Figure 7's thresholds. An arm without data has no row."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from examples.study import analysis
from examples.study.analysis import Run, Runs
from examples.study.tables import DASH, NOTHING, SETS, markdown, share, with_interval

LABELS = {
    "grpo": "GRPO",
    "dapo": "DAPO",
    "greso": "GRESO",
    "grpo_extended": "GRPO extended (n = 16)",
    "lens": "LENS",
    "lens_plus": "LENS plus (ours)",
    "resample": "Resampling",
    "random": "Random pruning",
    "gradient": "Gradient-based pruning",
    "oracle": "Deleting exactly the noise (ours)",
}
TABLE_1 = ("grpo", "dapo", "greso", "grpo_extended", "lens", "lens_plus")
TABLE_5 = ("grpo", "grpo_extended", "resample", "lens", "lens_plus")
TABLE_6 = ("grpo", "resample", "random", "gradient", "lens", "oracle")
TAUS = {"tau_0.125": "0.125", "tau_0.25": "0.250", "tau_0.375": "0.375", "lens": "0.500 (LENS)"}
GAMMAS = {
    **{"gamma_1": "1%", "gamma_2": "2%", "lens": "3% (LENS)"},
    **{"gamma_4": "4%", "gamma_5": "5%", "gamma_10": "10%"},
}


def blocks(runs: Runs, data: Path) -> dict[str, Callable[[], str]]:
    def labelled(arms: Sequence[str]) -> dict[str, str]:
        return {arm: LABELS[arm] for arm in arms}

    return {
        "table-1": lambda: ends(runs, labelled(TABLE_1), "Model", base=True),
        "table-4": lambda: ends(runs, TAUS, "tau"),
        "figure-7": lambda: ends(runs, GAMMAS, "deleted"),
        "table-5": lambda: step_costs(runs, data),
        "table-6": lambda: ends(runs, labelled(TABLE_6), "Method"),
    }


def ends(runs: Runs, arms: Mapping[str, str], head: str, base: bool = False) -> str:
    """Success in percent at the end on each held-out set, and their mean; the best bold, the second best underlined."""
    rows: list[tuple[str, str, list[float], str]] = []
    if base and "grpo" in runs:
        at_start = [_percent(runs["grpo"], partial(_at_start, metric=f"eval/{s}")) for s in SETS]
        rows.append(("Base model", DASH, [*at_start, mean(at_start)], DASH))
    for arm, label in arms.items():
        if arm not in runs:
            continue
        numbers = [_percent(runs[arm], partial(analysis.end, metric=f"eval/{s}")) for s in SETS]
        gain = None if arm == "grpo" else analysis.paired(runs, arm, "grpo", lambda run: 100 * _average(run))
        rows.append((label, str(len(runs[arm])), [*numbers, mean(numbers)], with_interval(gain, 2, signed=True)))
    if len(rows) < 2:
        return NOTHING
    marked = list(zip(*(_marked([row[2][i] for row in rows]) for i in range(len(SETS) + 1)), strict=True))
    shown = [(label, seeds, *cells, gain) for (label, seeds, _, gain), cells in zip(rows, marked, strict=True)]
    return markdown((head, "seeds", *SETS, "Avg.", "Avg. - GRPO's, same seeds"), shown)


def step_costs(runs: Runs, data: Path) -> str:
    """Means over steps and seeds; relative costs are geometric means over the seeds that the arm shares with GRPO."""
    sizes = group_sizes(data)
    rows = []
    for arm in TABLE_5:
        if arm not in runs:
            continue
        steps = [mean(run.costs(analysis.training_seconds)) for run in runs[arm].values()]
        relative = [_relative(runs, arm, cost) for cost in analysis.COSTS.values()]
        shown = [DASH if one is None else f"{one:.2f}x" for one in relative]
        rows.append((LABELS[arm], str(len(runs[arm])), str(sizes.get(arm, 8)), share(mean(steps), 2), *shown))
    head = ("Algorithm", "seeds", "group size", "mean step time (s)", *(f"relative {cost}" for cost in analysis.COSTS))
    return markdown(head, rows)


def group_sizes(data: Path) -> dict[str, int]:
    """Of the arms that change it."""
    with (data / "runs.csv").open(newline="", encoding="utf-8") as file:
        found = [(row["arm"], re.search(r"rollout\.n=(\d+)", row["set"])) for row in csv.DictReader(file)]
    return {arm: int(size.group(1)) for arm, size in found if size}


def _relative(runs: Runs, arm: str, cost: analysis.Cost) -> float | None:
    logs = []
    for seed in runs[arm].keys() & runs.get("grpo", {}).keys():
        own, base = (run.cost_until(len(run.rows), cost) for run in (runs[arm][seed], runs["grpo"][seed]))
        logs.append(math.log(own / base))
    return math.exp(mean(logs)) if logs else None


def _average(run: Run) -> float:
    return mean(analysis.end(run, f"eval/{name}") for name in SETS)


def _at_start(run: Run, metric: str) -> float:
    return run.values(metric)[0]


def _percent(runs: Mapping[int, Run], number: Callable[[Run], float]) -> float:
    return 100 * mean(number(run) for run in runs.values())


def _marked(column: Sequence[float]) -> list[str]:
    texts = [f"{value:.2f}" for value in column]
    levels = sorted(set(texts), key=float, reverse=True)
    if len(levels) < 2:
        return texts
    marks = {levels[0]: "**{}**", levels[1]: "<u>{}</u>"}
    return [marks.get(text, "{}").format(text) for text in texts]
