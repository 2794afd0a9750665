"""Arms of a study compared over paired seeds: curves into numbers, numbers into differences with their uncertainty.

A curve is (step, value) points in order of steps. Pairs are runs of two arms that share base model, data order and seed:
their difference varies less than either. The t interval trusts that differences are roughly normal, the sign-flip test
only that they are as likely to be negative as positive if the arms are equal; with n pairs its p is never below 2^(1 - n).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]


def area(curve: Curve) -> float:
    """Mean height under the straight lines between the points."""
    if len(curve) < 2:
        raise ValueError("an area needs at least two points")
    total = math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def smoothed(curve: Curve, window: int = 3) -> list[tuple[float, float]]:
    """Centred means of `window` points, of fewer at the ends."""
    reach = window // 2
    values = [y for _, y in curve]
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [(x, math.fsum(part) / len(part)) for (x, _), part in zip(curve, near, strict=True)]


def peak(curve: Curve) -> tuple[float, float]:
    """Step and value of the highest point, the first of equals."""
    return max(curve, key=lambda point: point[1])


def first_reach(curve: Curve, level: float) -> float | None:
    """The step at which the line through the points first reaches the level; None when it never does."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y >= level:
            if before is None or y == before[1]:
                return x
            return before[0] + (x - before[0]) * (level - before[1]) / (y - before[1])
        before = (x, y)
    return None


@dataclass(frozen=True)
class Contrast:
    """The mean difference of n pairs. Interval and tests are None where one pair does not tell."""

    pairs: int
    mean: float
    low: float | None
    high: float | None
    t_p: float | None
    flip_p: float | None


def contrast(differences: Sequence[float], level: float = 0.95) -> Contrast:
    n = len(differences)
    if n == 0:
        raise ValueError("no pairs")
    mean = math.fsum(differences) / n
    if n == 1:
        return Contrast(1, mean, None, None, None, None)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    reach = t_quantile(level, n - 1) * error
    t_p = (1.0 if mean == 0 else 0.0) if error == 0 else 1 - t_within(abs(mean) / error, n - 1)
    return Contrast(n, mean, mean - reach, mean + reach, t_p, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact and two-sided: the share of all 2^n choices of signs whose mean is at least as far from 0."""
    if len(differences) > 20:
        raise ValueError("more than 20 pairs: 2^n choices of signs are too many to go through")
    sizes = [abs(d) for d in differences]
    observed = abs(math.fsum(differences))
    slack = 1e-12 * math.fsum(sizes)  # sums of the same numbers in other orders are equal
    signs = itertools.product((1, -1), repeat=len(sizes))
    extreme = sum(abs(math.fsum(s * d for s, d in zip(sign, sizes, strict=True))) >= observed - slack for sign in signs)
    return extreme / 2 ** len(sizes)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p values: below alpha for any is a family-wise error below alpha."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def t_within(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t: a finite sum for whole degrees of freedom."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine_squared * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def t_quantile(level: float, degrees: int) -> float:
    """The t that |T| stays below with probability `level`."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, degrees) < level else (low, middle)
    return (low + high) / 2
