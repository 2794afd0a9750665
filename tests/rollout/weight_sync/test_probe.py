"""What a server may say of the probe, and what not."""

from __future__ import annotations

import math

import pytest

from lens_megatron.rollout.weight_sync.probe import Bound, Probe, bound_for

SAID = (-1.0, -2.0, -3.0, -4.0)


@pytest.mark.parametrize(
    ("tolerance", "fp32", "mixture", "bound"),
    [
        (None, True, False, Bound(1e-4)),
        (None, False, False, Bound(0.5)),
        (None, True, True, Bound(1e-4)),
        (None, False, True, Bound(3.0, 0.15)),
        (0.2, False, True, Bound(0.2)),
        (0.2, True, False, Bound(0.2)),
    ],
)
def test_the_bound_follows_precision_and_model_unless_it_is_given(
    tolerance: float | None, fp32: bool, mixture: bool, bound: Bound
) -> None:
    assert bound_for(tolerance, fp32, mixture) == bound


@pytest.mark.parametrize(
    ("bound", "answer", "fine"),
    [
        (Bound(0.5), (-1.0, -2.0, -3.0, -4.4), True),
        (Bound(0.5), (-1.0, -2.0, -3.0, -4.6), False),
        (Bound(3.0, 0.5), (-1.0, -2.0, -3.0, -5.4), True),  # another expert for one token
        (Bound(3.0, 0.5), (-1.0, -2.0, -3.0, -7.1), False),  # a broken expert for one token
        (Bound(3.0, 0.5), (-1.6, -2.6, -3.6, -4.6), False),  # a tensor that is wrong moves them all
        (Bound(3.0, 0.15), (-1.0, -2.0, -3.0, math.nan), False),
        (Bound(0.5), (-1.0, -2.0, -3.0, -math.inf), False),
    ],
)
def test_one_token_or_all_of_them(bound: Bound, answer: tuple[float, ...], fine: bool) -> None:
    complaint = Probe((5, 6, 7, 8, 9), SAID, bound).complaint(answer)
    assert (complaint is None) == fine
    if complaint is not None:
        assert "\n" not in complaint and f"at most {bound.largest:g}" in complaint
