"""The study's numbers from its committed tables. Pure: rows in, numbers out; report.py shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

from examples.study import contrasts
from examples.study.contrasts import Contrast, Curve

PRIMARY = "eval/noisy"  # held-out prompts with two words of noise
PHASES = ("early", "middle", "late")
BUCKETS = ("failure", "low", "mid", "high", "solved")
Row = Mapping[str, Any]
Cost = Callable[[Row], float]


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int
    rows: tuple[Row, ...]  # by step; step 0 has the base model's evaluation and nothing else

    def curve(self, metric: str) -> list[tuple[float, float]]:
        return [(float(row["step"]), row[metric]) for row in self.rows if row.get(metric) is not None]

    def values(self, metric: str) -> list[float]:
        return [y for _, y in self.curve(metric)]

    def last(self, metric: str) -> float | None:
        values = self.values(metric)
        return values[-1] if values else None

    def until(self, step: int) -> Run:
        """The first steps of a longer run: with a constant rate they are those of a shorter one."""
        return Run(self.arm, self.seed, tuple(row for row in self.rows if row["step"] <= step))

    def costs(self, cost: Cost) -> list[float]:
        """Of every step."""
        return [cost(row) for row in self.rows if row["step"] > 0]

    def cost_until(self, step: float, cost: Cost) -> float:
        """The sum up to a step, in proportion within the step that it falls in."""
        each = self.costs(cost)
        totals = [0.0, *accumulate(each)]
        whole = min(int(step), len(each))
        rest = step - whole
        return totals[whole] + (rest * each[whole] if rest > 0 and whole < len(each) else 0.0)


Runs = dict[str, dict[int, Run]]  # arm -> seed -> run


def load_runs(data: Path, study: str = "main") -> Runs:
    import pyarrow.parquet as pq

    found: dict[tuple[str, int], list[Row]] = {}
    if not (data / "steps.parquet").exists():
        return {}
    for row in pq.read_table(data / "steps.parquet").to_pylist():
        if row["study"] == study:
            known = {name: value for name, value in row.items() if value is not None}
            if "eval/graded" in known:  # until December 2026 that was the mean reward, and nothing had this name
                known.setdefault("eval/graded/reward", known["eval/graded"])
            found.setdefault((row["arm"], row["seed"]), []).append(known)
    runs: Runs = {}
    for (arm, seed), rows in found.items():
        runs.setdefault(arm, {})[seed] = Run(arm, seed, tuple(sorted(rows, key=lambda row: row["step"])))
    return runs


def over_seeds(runs: Mapping[int, Run], number: Callable[[Run], float | None]) -> Contrast | None:
    """Mean and interval of a number over an arm's seeds, those that have it."""
    values = [value for _, run in sorted(runs.items()) if (value := number(run)) is not None]
    return contrasts.contrast(values) if values else None


def paired(runs: Runs, arm: str, against: str, number: Callable[[Run], float | None]) -> Contrast | None:
    """`arm` minus `against`, over the seeds that both have."""
    differences = []
    for seed in sorted(runs.get(arm, {}).keys() & runs.get(against, {}).keys()):
        a, b = number(runs[arm][seed]), number(runs[against][seed])
        if a is not None and b is not None:
            differences.append(a - b)
    return contrasts.contrast(differences) if differences else None


def area(run: Run, metric: str = PRIMARY) -> float:
    return contrasts.area(run.curve(metric))


def end(run: Run, metric: str = PRIMARY, evaluations: int = 3) -> float:
    """Mean of the last evaluations."""
    return mean(run.values(metric)[-evaluations:])


@dataclass(frozen=True)
class Reach:
    """How long an arm took to the peak of the baseline's smoothed curve, in the same seed."""

    seed: int
    baseline_step: float  # of its peak
    step: float  # of the arm; the last one if it never got there
    censored: bool


def reach_peak(runs: Runs, arm: str, baseline: str = "grpo", metric: str = PRIMARY, share: float = 1.0) -> list[Reach]:
    """`share`: of the height, for a plateau that curves touch anywhere."""
    found = []
    for seed in sorted(runs.get(arm, {}).keys() & runs.get(baseline, {}).keys()):
        of_baseline = contrasts.smoothed(runs[baseline][seed].curve(metric))
        at, level = contrasts.peak(of_baseline)
        level *= share
        if share < 1.0 and (reached := contrasts.first_reach(of_baseline, level)) is not None:
            at = reached
        curve: Curve = contrasts.smoothed(runs[arm][seed].curve(metric))
        step = contrasts.first_reach(curve, level)
        found.append(Reach(seed, at, curve[-1][0] if step is None else step, step is None))
    return found


def log_speed(reaches: Sequence[Reach]) -> Contrast | None:
    """log(baseline's steps / arm's steps): above 0 where the arm is faster. A censored arm counts as arriving at the end,
    which flatters it."""
    logs = [math.log(max(one.baseline_step, 1.0) / max(one.step, 1.0)) for one in reaches]
    return contrasts.contrast(logs) if logs else None


def rollouts(row: Row) -> float:
    return _number(row, "sampling/original_rollouts") + _number(row, "sampling/purified_rollouts")


def tokens(row: Row) -> float:
    return _number(row, "tokens") + _number(row, "sampling/wasted_tokens")


def training_seconds(row: Row) -> float:
    """The paper compares training: evaluations are not in its times."""
    return _number(row, "time/step") - _number(row, "time/eval")


def _number(row: Row, metric: str) -> float:
    return float(row.get(metric) or 0.0)


COSTS: dict[str, Cost] = {"rollouts": rollouts, "tokens": tokens, "seconds": training_seconds}


def cost_to_peak(
    runs: Runs, arm: str, cost: str, baseline: str = "grpo", metric: str = PRIMARY, share: float = 1.0
) -> float | None:
    """Geometric mean over seeds of the arm's cost to the baseline's peak over the baseline's."""
    logs = []
    for one in reach_peak(runs, arm, baseline, metric, share):
        own = runs[arm][one.seed].cost_until(one.step, COSTS[cost])
        base = runs[baseline][one.seed].cost_until(one.baseline_step, COSTS[cost])
        if own > 0 and base > 0:
            logs.append(math.log(own / base))
    return math.exp(mean(logs)) if logs else None


def weighted(run: Run, metric: str, weight: str = "purified_ratio") -> float | None:
    """The mean over prompts of a metric that each step gives as a mean over `weight` of its prompts."""
    both = [(row[metric], row[weight]) for row in run.rows if row.get(metric) is not None and row.get(weight)]
    total = math.fsum(w for _, w in both)
    return math.fsum(value * w for value, w in both) / total if total else None


def plain(run: Run, metric: str) -> float | None:
    values = run.values(metric)
    return mean(values) if values else None


def by_phase(run: Run, metric: str) -> dict[str, float]:
    """Means of the first, the middle and the last third of the steps."""
    curve = [(x, y) for x, y in run.curve(metric) if x > 0]
    last = max((row["step"] for row in run.rows), default=0)
    parts: dict[str, list[float]] = {name: [] for name in PHASES}
    for x, y in curve:
        parts[PHASES[min(2, int(3 * (x - 1) / last))]].append(y)
    return {name: mean(values) for name, values in parts.items() if values}


def band(runs: Mapping[int, Run], metric: str, window: int = 1) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) over the seeds, of the steps that all of them have; without an interval for one seed."""
    curves = [dict(contrasts.smoothed(run.curve(metric), window)) for run in runs.values()]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = []
    for step in shared:
        one = contrasts.contrast([curve[step] for curve in curves])
        low, high = (one.mean, one.mean) if one.low is None or one.high is None else (one.low, one.high)
        points.append((step, one.mean, low, high))
    return points
