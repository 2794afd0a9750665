"""Against closed forms, enumeration and simulation."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.evaluation.statistics import (
    average_at_k,
    bootstrap_interval,
    mean_pass_at_k,
    pass_at_k,
    plain_mean,
    plain_mean_error,
    sampling_error,
    standard_error,
)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(combinations(range(samples), k))
            share = sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_in_binomials(samples: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    exact = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
    assert pass_at_k(samples, correct, k) == pytest.approx(exact, abs=1e-9)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over draws of n samples is 1 - (1 - p)^k, which 1 - (1 - c/n)^k misses."""
    generator = np.random.default_rng(0)
    p, n, k = 0.15, 6, 4
    counts = generator.binomial(n, p, 40_000)
    mean = np.mean([pass_at_k(n, int(c), k) for c in counts])
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.008)
    assert abs(np.mean(1 - (1 - counts / n) ** k) - (1 - (1 - p) ** k)) > 0.02


def test_pass_at_1_is_the_average() -> None:
    scores = [[1.0, 0, 0, 1], [0.0, 0, 0, 0], [1.0, 1, 1, 0]]
    assert mean_pass_at_k(scores, 1) == pytest.approx(average_at_k(scores)) == pytest.approx(5 / 12)
    assert mean_pass_at_k(scores, 4) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_it_cannot_know(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, correct, k)


def test_every_problem_weighs_the_same_whatever_its_samples() -> None:
    assert average_at_k([[1.0], [0.0, 0.0, 0.0]]) == 0.5


def test_standard_error_of_single_samples_is_the_binomial_one() -> None:
    right, n = 320, 500
    scores = [[1.0]] * right + [[0.0]] * (n - right)
    p = right / n
    assert standard_error(scores) == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert math.isnan(standard_error([[1.0]]))
    assert math.isnan(sampling_error(scores))


def test_errors_by_simulation() -> None:
    """Thirty problems of different difficulty, sixteen samples: both errors are what repeating the experiment shows."""
    draw = random.Random(3)
    difficulty = [draw.random() for _ in range(30)]
    generator = np.random.default_rng(1)

    def scores(chances: list[float]) -> list[list[float]]:
        return [list(map(float, generator.random(16) < p)) for p in chances]

    same_problems = [average_at_k(scores(difficulty)) for _ in range(1500)]
    claimed = np.mean([sampling_error(scores(difficulty)) for _ in range(200)])
    assert claimed == pytest.approx(np.std(same_problems), rel=0.08)
    new_problems = [average_at_k(scores(list(generator.random(30)))) for _ in range(1500)]
    claimed = np.mean([standard_error(scores(list(generator.random(30)))) for _ in range(200)])
    assert claimed == pytest.approx(np.std(new_problems), rel=0.08)


def test_the_bootstrap_agrees_with_the_normal_interval_and_its_seed() -> None:
    scores = [[1.0]] * 200 + [[0.0]] * 300
    interval = bootstrap_interval(scores, seed=5)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 500)
    assert interval.low == pytest.approx(0.4 - half, abs=0.004)
    assert interval.high == pytest.approx(0.4 + half, abs=0.004)
    assert bootstrap_interval(scores, seed=5) == interval
    assert bootstrap_interval(scores, seed=6) != interval
    narrow = bootstrap_interval(scores, seed=5, level=0.5)
    assert interval.low < narrow.low < 0.4 < narrow.high < interval.high
    certain = bootstrap_interval([[1.0, 1.0]] * 10, seed=0)
    assert (certain.low, certain.high) == (1.0, 1.0)


def test_the_bootstrap_covers_what_it_says() -> None:
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        scores = [[float(x)] for x in generator.random(60) < 0.3]
        interval = bootstrap_interval(scores, seed=trial, draws=1000)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_plain_mean_weighs_benchmarks_and_not_problems() -> None:
    assert plain_mean([0.8, 0.2]) == 0.5
    assert plain_mean_error([0.03, 0.04]) == pytest.approx(0.025)
    for function in (plain_mean, plain_mean_error):
        with pytest.raises(ValueError, match="no "):
            function([])


@pytest.mark.parametrize("scores", [[], [[1.0], []]])
def test_nothing_is_not_zero(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        average_at_k(scores)
