from __future__ import annotations

import json

import pytest

from lens_megatron.algorithms.rescue import RebuiltGroup, RescueConfig, rebuild_group
from lens_megatron.algorithms.transfer import TransferTracker

from .rescue_groups import binary, group

LENS = RescueConfig(mode="purification")


def seen(name: str, successes: int, found: int | None = None) -> RebuiltGroup:
    return rebuild_group(group(binary(successes), () if found is None else binary(found), name), LENS, 0, 0)


def test_rescued_prompts_against_others_of_the_same_a() -> None:
    tracker = TransferTracker(lag=2)
    tracker.update(0, [seen("r0", 0, 4), seen("r1", 0, 4), seen("c0", 0, 0), seen("r2", 2, 4), seen("c2", 2, 1)])
    nothing_yet = tracker.update(0, [seen("r3", 3, 4), seen("easy", 5)])
    assert nothing_yet == {"transfer/rescued_prompts": 0.0, "transfer/other_prompts": 0.0}
    metrics = tracker.update(
        2, [seen("r0", 2), seen("r1", 4), seen("c0", 1), seen("r2", 6), seen("c2", 5), seen("r3", 8), seen("easy", 8)]
    )
    assert metrics["transfer/rescued_prompts"] == 4
    assert metrics["transfer/other_prompts"] == 2
    assert metrics["transfer/rescued_gain"] == pytest.approx((2 / 8 + 4 / 8 + 4 / 8 + 5 / 8) / 4)
    # a = 0: two rescued, (2/8 + 4/8)/2 - 1/8 = 2/8; a = 1/4: one, 6/8 - 5/8; a = 3/8: no match, left out
    assert metrics["transfer/matched_difference"] == pytest.approx((2 * 2 / 8 + 1 / 8) / 3)


def test_an_early_visit_changes_nothing_whatever_comes_of_it() -> None:
    """If a failure began the wait anew, only prompts that did well at every visit would be asked: a gain of nothing."""
    tracker = TransferTracker(lag=3)
    tracker.update(0, [seen("solved", 0, 4), seen("failed", 0, 4)])
    metrics = tracker.update(1, [seen("solved", 8), seen("failed", 0, 4)])  # too early to count
    assert metrics["transfer/rescued_prompts"] == 0
    metrics = tracker.update(3, [seen("solved", 4), seen("failed", 0, 4)])
    assert (metrics["transfer/rescued_prompts"], metrics["transfer/other_prompts"]) == (2, 0)
    assert metrics["transfer/rescued_gain"] == (4 / 8 + 0) / 2
    metrics = tracker.update(6, [seen("solved", 4), seen("failed", 8)])  # who failed when asked waits from then on
    assert metrics["transfer/rescued_prompts"] == 3


def test_state_survives_a_checkpoint() -> None:
    tracker, resumed = TransferTracker(lag=1), TransferTracker(lag=1)
    tracker.update(0, [seen("a", 1, 4), seen("b", 1, 0)])
    tracker.update(1, [seen("a", 3, 5)])
    resumed.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    last = [seen("a", 5), seen("b", 2)]
    assert resumed.update(2, last) == tracker.update(2, last)
    assert "transfer/matched_difference" in resumed.metrics()
