"""What a table of benchmarks needs: pass@k, Average@k, standard errors and intervals. Numbers in, numbers out.

`scores` is one list a problem of its samples' scores, 0 to 1 (1: right). Problems are the units that are drawn at random:
samples of one problem are not independent evidence, so every error below is over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Scores = Sequence[Sequence[float]]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from `samples` of which `correct` were (Chen et al. 2021)."""
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples and 0 <= correct <= samples (got {correct} of {samples})")
    # 1 - C(n - c, k) / C(n, k), as a product that cannot overflow
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k) if samples - correct > i - 1)


def mean_pass_at_k(scores: Scores, k: int) -> float:
    """Over the problems. A sample counts when its score is 1."""
    _check(scores)
    return math.fsum(pass_at_k(len(row), sum(score >= 1 for score in row), k) for row in scores) / len(scores)


def average_at_k(scores: Scores) -> float:
    """The mean score of k samples a problem; of one sample, Pass@1. Every problem weighs the same."""
    return math.fsum(_problem_means(scores)) / len(scores)


def standard_error(scores: Scores) -> float:
    """Of `average_at_k`, from the spread between problems, which already holds that of the sampling."""
    means = _problem_means(scores)
    if len(means) < 2:
        return math.nan
    centre = math.fsum(means) / len(means)
    variance = math.fsum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))


def sampling_error(scores: Scores) -> float:
    """What the same problems sampled again would vary by: the error of a comparison on a fixed set. NaN for one sample."""
    _check(scores)
    if any(len(row) < 2 for row in scores):
        return math.nan
    total = 0.0
    for row in scores:
        mean = math.fsum(row) / len(row)
        total += math.fsum((score - mean) ** 2 for score in row) / (len(row) - 1) / len(row)
    return math.sqrt(total) / len(scores)


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def bootstrap_interval(scores: Scores, seed: int, level: float = 0.95, draws: int = 10_000) -> Interval:
    """Percentiles of the mean of problems drawn with replacement."""
    if not 0 < level < 1 or draws < 100:
        raise ValueError(f"level is between 0 and 1, draws at least 100 (got {level}, {draws})")
    means = np.asarray(_problem_means(scores))
    generator = np.random.default_rng(seed)
    resampled = np.empty(draws)
    for start in range(0, draws, 1000):  # 1000 x 675 indices at a time
        count = min(1000, draws - start)
        resampled[start : start + count] = means[generator.integers(0, len(means), (count, len(means)))].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def plain_mean(averages: Sequence[float]) -> float:
    """The last column of the table: every benchmark weighs the same, whatever its size."""
    if not averages:
        raise ValueError("no averages")
    return math.fsum(averages) / len(averages)


def plain_mean_error(errors: Sequence[float]) -> float:
    """Of the plain mean, from the errors of independent benchmarks."""
    if not errors:
        raise ValueError("no errors")
    return math.sqrt(math.fsum(error * error for error in errors)) / len(errors)


def _problem_means(scores: Scores) -> list[float]:
    _check(scores)
    return [math.fsum(row) / len(row) for row in scores]


def _check(scores: Scores) -> None:
    if not scores or not all(scores):
        raise ValueError("scores need at least one problem, and every problem one sample")
