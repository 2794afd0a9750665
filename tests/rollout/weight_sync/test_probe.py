"""What a server may say of the probe, and what not."""

from __future__ import annotations

import math

import pytest

from lens_megatron.rollout.weight_sync.probe import Bound, Probe, bound_for

SAID = (-1.0, -2.0, -3.0, -4.0)


@pytest.mark.parametrize(
    ("tolerance", "fp32", "mixture", "bound"),
    [
        (None, True, False, Bound("largest", 1e-4)),
        (None, False, False, Bound("largest", 0.5)),
        (None, True, True, Bound("largest", 1e-4)),
        (None, False, True, Bound("mean", 0.25)),
        (0.2, False, True, Bound("largest", 0.2)),
        (0.2, True, False, Bound("largest", 0.2)),
    ],
)
def test_the_bound_follows_precision_and_model_unless_it_is_given(
    tolerance: float | None, fp32: bool, mixture: bool, bound: Bound
) -> None:
    assert bound_for(tolerance, fp32, mixture) == bound


@pytest.mark.parametrize(
    ("bound", "answer", "fine"),
    [
        (Bound("largest", 0.5), (-1.0, -2.0, -3.0, -4.4), True),
        (Bound("largest", 0.5), (-1.0, -2.0, -3.0, -4.6), False),
        (Bound("mean", 0.25), (-1.0, -2.0, -3.0, -4.9), True),  # another expert for one token
        (Bound("mean", 0.25), (-1.3, -2.3, -3.3, -4.3), False),  # a tensor that is wrong moves them all
        (Bound("mean", 0.25), (-1.0, -2.0, -3.0, math.nan), False),
        (Bound("largest", 0.5), (-1.0, -2.0, -3.0, -math.inf), False),
    ],
)
def test_one_token_or_all_of_them(bound: Bound, answer: tuple[float, ...], fine: bool) -> None:
    complaint = Probe((5, 6, 7, 8, 9), SAID, bound).complaint(answer)
    assert (complaint is None) == fine
    if complaint is not None:
        assert "\n" not in complaint and f"{bound.kind} difference at most {bound.most:g}" in complaint
