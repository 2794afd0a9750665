"""The numbers behind the paper's figures, from a run's own metrics and rollouts. Pure; the drawing is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean, median
from typing import Any

from lens_megatron.reporting.charts import smooth
from lens_megatron.reporting.runs import Point, Run, is_number

PHASES = ("score", "generate", "reward", "logprobs", "train", "sync", "save")
BUCKETS = ("failure", "low", "mid", "high", "solved")  # group_metrics.bucket
WINDOWS = ("early", "middle", "late")
BINS_A_DECADE = 4
LEAST_SCORE = 1e-8  # smaller ones, which only rounding makes, share its bin


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth of the steps (at least one): a single batch says little."""
    if not values:
        return None
    size = max(1, len(values) // 10)
    return mean(values[:size]), mean(values[-size:])


def thirds(length: int) -> list[slice]:
    """Early, middle and late steps: a third of the run each, the middle one taking what does not divide."""
    if length < 3:
        return [slice(0, 0)] * 3
    size = length // 3
    return [slice(0, size), slice(size, length - size), slice(length - size, length)]


def success_distribution(run: Run, group: str) -> dict[str, list[float]] | None:
    """Figure 5: shares of prompts by bucket, means over each third of the run. group: original (Y) or trained (G)."""
    by_bucket = {name: run.values(f"success_distribution/{group}/{name}") for name in BUCKETS}
    steps = {len(values) for values in by_bucket.values()}
    if len(steps) != 1 or min(steps) < 3:
        return None
    return {
        window: [mean(by_bucket[name][part]) for name in BUCKETS]
        for window, part in zip(WINDOWS, thirds(steps.pop()), strict=True)
    }


@dataclass(frozen=True)
class ScoreHistogram:
    """Figure 2b: shares of all scored tokens, by logarithmic bin for those above 0: bin k starts at 10^(k / 4)."""

    tokens: int
    zero_share: float
    shares: dict[int, float]


def score_histogram(scores: Iterable[float]) -> ScoreHistogram | None:
    counts: dict[int, int] = {}
    tokens = zeros = 0
    for score in scores:
        tokens += 1
        if score <= 0:
            zeros += 1
        else:
            place = math.floor(math.log10(max(score, LEAST_SCORE)) * BINS_A_DECADE + 1e-6)
            counts[place] = counts.get(place, 0) + 1
    if tokens == 0:
        return None
    return ScoreHistogram(tokens, zeros / tokens, {place: count / tokens for place, count in sorted(counts.items())})


def bin_range(histograms: Sequence[ScoreHistogram]) -> tuple[int, list[float]]:
    """The first bin in use, and the edges from there to the end of the last one."""
    places = [place for one in histograms for place in one.shares]
    if not places:
        return 0, []
    return min(places), [10.0 ** (place / BINS_A_DECADE) for place in range(min(places), max(places) + 2)]


@dataclass(frozen=True)
class Lead:
    """How far another run was above the baseline when the first of the two reached the peak; `error`: standard error."""

    difference: float
    error: float

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= 2 * self.error


@dataclass(frozen=True)
class Speedup:
    """Figure 6: when another run first reaches the baseline's peak. None: it never does."""

    peak: float
    baseline_steps: float
    baseline_seconds: float | None
    steps: float | None
    seconds: float | None
    lead: Lead | None = None  # None: no standard errors in the metrics

    @property
    def in_steps(self) -> float | None:
        return self.baseline_steps / self.steps if self.steps else None

    @property
    def in_time(self) -> float | None:
        return self.baseline_seconds / self.seconds if self.baseline_seconds and self.seconds else None


def speedup(base: Run, other: Run, metric: str) -> Speedup | None:
    window = speedup_window(metric, len(base.points(metric)))
    base_curve, curve = smooth(base.points(metric), window), smooth(other.points(metric), window)
    # the first mean over a whole window is the first that can count: before, one lucky batch would
    base_curve, curve = base_curve[window - 1 :], curve[window - 1 :]
    if not base_curve or not curve:
        return None
    peak = max(value for _, value in base_curve)
    base_step = next(step for step, value in base_curve if value == peak)
    step = next((step for step, value in curve if value >= peak - 1e-12), None)
    return Speedup(
        peak,
        base_step,
        seconds_until(base, base_step),
        step,
        None if step is None else seconds_until(other, step),
        _lead(base, other, metric, base_step if step is None else min(base_step, step)),
    )


def _lead(base: Run, other: Run, metric: str, step: float) -> Lead | None:
    """At the last evaluations up to `step`. The two errors are taken as independent, though the problems are the same."""
    found = []
    for run in (base, other):
        values, errors = dict(run.points(metric)), dict(run.points(f"{metric}/standard_error"))
        at = max((at for at in values if at <= step), default=None)
        if at is None or at not in errors:
            return None
        found.append((values[at], errors[at]))
    (before, error), (after, other_error) = found
    return Lead(after - before, math.hypot(error, other_error))


def speedup_window(metric: str, points: int) -> int:
    """Steps averaged before a peak is looked for; evaluations, few and large, are taken as they are."""
    return 1 if metric.startswith("eval/") else max(1, min(10, points // 5))


def speedup_metric(runs: Sequence[Run]) -> str:
    """Evaluation if every run has it often enough, else success on the training prompts."""
    for name in ("eval/average", *evaluation_names(runs)):
        if all(len(run.points(name)) >= 3 for run in runs):
            return name
    return "success"


def evaluation_names(runs: Sequence[Run]) -> list[str]:
    """eval/NAME, one a benchmark; deeper names are details of one."""
    names = dict.fromkeys(name for run in runs for name in run.metric_names())
    return [name for name in names if name.startswith("eval/") and name.count("/") == 1]


def seconds_until(run: Run, step: float) -> float | None:
    """Of training, up to the end of this step; None when a step's time is missing."""
    times = [_training_seconds(line) for line in run.steps() if line["step"] <= step]
    return sum(time for time in times if time is not None) if times and None not in times else None


def _training_seconds(line: Mapping[str, Any]) -> float | None:
    """Of a step, without the evaluation that followed it."""
    if not is_number(line.get("time/step")):
        return None
    return float(line["time/step"]) - float(line.get("time/eval") or 0.0)


@dataclass(frozen=True)
class StepTime:
    """Table 5, without the first step (which loads, compiles and warms up) where there are others."""

    mean: float
    median: float
    phases: dict[str, float]  # mean seconds; with `other`: of the step, in no phase


def _phases_apart(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase, none counted twice: waiting for rewards is part of generation in a step's line. A batch that was
    made while another trained waited then, and nobody for it."""
    seconds = {name[5:]: float(value or 0.0) for name, value in line.items() if name.startswith("time/")}
    if "reward" in seconds and "generate" in seconds:
        seconds["reward"] = min(seconds["reward"], seconds["generate"])
        seconds["generate"] -= seconds["reward"]
    return seconds


def step_time(run: Run) -> StepTime | None:
    lines = [line for line in run.steps() if is_number(line.get("time/step"))]
    lines = lines[1:] if len(lines) > 1 else lines
    if not lines:
        return None
    times = [time for line in lines if (time := _training_seconds(line)) is not None]
    names = [name for line in lines for name in line if name.startswith("time/") and name.count("/") == 1]
    known = [phase for phase in PHASES if f"time/{phase}" in names]
    more = [name[5:] for name in dict.fromkeys(names) if name[5:] not in (*PHASES, "step", "eval")]
    apart = [_phases_apart(line) for line in lines]
    phases = {phase: mean(line.get(phase, 0.0) for line in apart) for phase in [*known, *more]}
    rest = mean(times) - sum(phases.values())
    if rest > 0:
        phases["other"] = rest
    return StepTime(mean(times), median(times), phases)


def step_seconds(run: Run) -> list[Point]:
    return [(float(line["step"]), time) for line in run.steps() if (time := _training_seconds(line)) is not None]


def tokens_a_second(run: Run) -> list[Point]:
    return [
        (float(line["step"]), line["tokens"] / time)
        for line in run.steps()
        if line.get("tokens") and (time := _training_seconds(line))
    ]


def over_time(run: Run, metric: str, unit_seconds: float) -> list[Point]:
    """The metric over training time instead of steps."""
    times = [_training_seconds(line) for line in run.steps()]
    if None in times:
        return []
    until = accumulate(time / unit_seconds for time in times if time is not None)
    at_step = {float(line["step"]): time for line, time in zip(run.steps(), until, strict=True)}
    return [(at_step.get(step, 0.0), value) for step, value in run.points(metric)]
