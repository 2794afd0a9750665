"""The statistics of a study against slow references written here and numbers from tables."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from examples.study import contrasts

differences = st.lists(st.floats(-1, 1, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=2, max_size=8)


def slow_t_within(t: float, degrees: int, parts: int = 20_000) -> float:
    """Simpson's rule over the density."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)

    def density(x: float) -> float:
        return math.exp(log_scale - (degrees + 1) / 2 * math.log1p(x * x / degrees))

    h = t / parts
    inner = math.fsum((4 if i % 2 else 2) * density(i * h) for i in range(1, parts))
    return 2 * h / 3 * (density(0) + inner + density(t))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.365, 6.0])
def test_student_t_is_the_integral_of_its_density(degrees: int, t: float) -> None:
    assert contrasts.t_within(t, degrees) == pytest.approx(slow_t_within(t, degrees), abs=1e-9)


@pytest.mark.parametrize(("degrees", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042)])
def test_quantiles_of_the_printed_table(degrees: int, table: float) -> None:
    assert contrasts.t_quantile(0.95, degrees) == pytest.approx(table, abs=5e-4)


def test_an_interval_covers_as_often_as_it_says() -> None:
    rng = random.Random(0)
    draws = [contrasts.contrast([rng.gauss(0.3, 1) for _ in range(5)]) for _ in range(2000)]
    covered = sum(one.low <= 0.3 <= one.high for one in draws) / 2000  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))
    # the interval leaves out 0 exactly when p is below 0.05
    assert all((one.t_p < 0.05) == (not one.low <= 0 <= one.high) for one in draws)  # type: ignore[operator]


@settings(max_examples=100, deadline=None)
@given(differences)
def test_sign_flips_by_going_through_them(values: list[float]) -> None:
    micro = [round(value * 1e6) for value in values]  # whole numbers: no rounding to worry about
    count = 0
    for mask in range(2 ** len(micro)):
        count += abs(sum(v if mask >> i & 1 else -v for i, v in enumerate(micro))) >= abs(sum(micro))
    assert contrasts.sign_flip_p(values) == count / 2 ** len(micro)


def test_eight_pairs_that_agree() -> None:
    assert contrasts.sign_flip_p([0.01 * k for k in range(1, 9)]) == 2 / 2**8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=6))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    named = {str(i): p for i, p in enumerate(p_values)}
    adjusted = contrasts.holm(named)
    for alpha in (0.01, 0.05, 0.3, 0.9):
        rejected: set[str] = set()
        for place, name in enumerate(sorted(named, key=lambda name: named[name])):
            if (len(named) - place) * named[name] > alpha:
                break
            rejected.add(name)
        assert {name for name, p in adjusted.items() if p <= alpha} == rejected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=2, max_size=8))
def test_area_and_first_reach_on_a_fine_grid(gaps: list[tuple[int, float]]) -> None:
    steps = list(itertools.accumulate(gap for gap, _ in gaps))
    curve = [(float(step), y) for step, (_, y) in zip(steps, gaps, strict=True)]

    def height(x: float) -> float:
        for (x0, y0), (x1, y1) in itertools.pairwise(curve):
            if x0 <= x <= x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        raise AssertionError

    width = steps[-1] - steps[0]
    grid = [steps[0] + width * (i + 0.5) / 7000 for i in range(7000)]
    assert contrasts.area(curve) == pytest.approx(math.fsum(map(height, grid)) / len(grid), abs=2e-3)
    level = 0.5
    assume(all(abs(y - level) > 1e-3 for _, y in curve))  # a point that just touches it is a matter of rounding
    reached = contrasts.first_reach(curve, level)
    seen = next((x for x in sorted([*map(float, steps), *grid]) if height(x) >= level), None)
    assert (reached is None) == (seen is None)
    if reached is not None and seen is not None:
        assert reached == pytest.approx(seen, abs=width / 3000)


def test_peak_and_smoothing_by_hand() -> None:
    curve = [(0.0, 0.0), (5.0, 0.6), (10.0, 0.3), (15.0, 0.6)]
    assert contrasts.smoothed(curve) == [
        (0.0, 0.3),
        (5.0, pytest.approx(0.3)),
        (10.0, 0.5),
        (15.0, pytest.approx(0.45)),
    ]
    assert contrasts.peak(contrasts.smoothed(curve)) == (10.0, 0.5)
    assert contrasts.peak(curve) == (5.0, 0.6)


def test_one_pair_has_no_interval() -> None:
    one = contrasts.contrast([0.2])
    assert (one.pairs, one.mean, one.low, one.t_p, one.flip_p) == (1, 0.2, None, None, None)
    same = contrasts.contrast([0.0, 0.0])
    assert (same.mean, same.low, same.t_p, same.flip_p) == (0.0, 0.0, 1.0, 1.0)
