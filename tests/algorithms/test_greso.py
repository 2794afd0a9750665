"""GRESO's formulas by hand, and one test for each trap of its public code."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.greso import GresoConfig, GresoHistory, adaptive_batch, largest_batch
from lens_megatron.errors import UsageError
from lens_megatron.strict import build

PUBLISHED = GresoConfig()


def history_of(rewards: list[float], config: GresoConfig = PUBLISHED) -> GresoHistory:
    """Of groups in which every rollout has the same reward."""
    history = GresoHistory(config)
    for reward in rewards:
        history.observe("p", [reward] * 8)
    return history


@pytest.mark.parametrize(
    ("rewards", "probability"),
    [
        ([], 0.0),  # never seen
        ([0.5], 0.0),
        ([1.0], 0.5),
        ([1.0, 1.0], 0.75),
        ([0.0, 0.0, 0.0], 0.875),
        ([0.1], 0.5),  # format only
        ([0.12], 0.0),
        ([0.97], 0.0),
        ([0.98], 0.5),
        ([1.0, 0.5, 1.0], 0.5),  # only the trailing streak counts
        ([1.0, 1.0, 1.0, 0.0], 0.5),  # a hard streak of one ends the easy one
        ([0.0, 0.0, 0.0, 1.0], 0.5),
        ([0.0] * 20, 0.99),  # never less than one chance in a hundred
    ],
)
def test_skip_probability_by_hand(rewards: list[float], probability: float) -> None:
    assert history_of(rewards).skip_probability("p") == pytest.approx(probability)
    assert history_of(rewards).skip_probability("another") == 0.0


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 0, 1, 4, 7, 8, 8]), max_size=12), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_skip_probability_against_the_whole_trace(successes: list[int], p_easy: float, p_hard: float) -> None:
    """The reference keeps every group and counts from the end: first as easy, then as hard."""
    expected = 0.0
    for p, belonging in ((p_easy, 8), (p_hard, 0)):
        z = 0
        for count in reversed(successes):
            if count != belonging:
                break
            z += 1
        if z:
            expected = 1 - max(p**z, 0.01)
            break
    history = GresoHistory(GresoConfig(p_easy=p_easy, p_hard=p_hard))
    for count in successes:
        history.observe("p", [1.0] * count + [0.0] * (8 - count))
    assert history.skip_probability("p") == pytest.approx(expected)


def test_p_moves_by_one_hundredth_towards_its_target() -> None:
    history = GresoHistory(PUBLISHED)
    third = 0.25 / 3
    history.adapt({"easy": third, "hard": third})  # easy at its 8.33%: skip more; hard below its 16.67%: skip less
    assert (history.p_easy, history.p_hard) == (0.49, 0.51)
    history.adapt({"easy": 0.0, "hard": 0.5})
    assert (history.p_easy, history.p_hard) == (0.5, 0.5)
    for _ in range(20):
        history.adapt({"easy": 1.0, "hard": 0.0})
    assert (history.p_easy, history.p_hard) == (0.3, 0.7)  # no rounding piles up


def test_p_stays_within_its_bounds() -> None:
    history = GresoHistory(PUBLISHED)
    for _ in range(46):
        history.adapt({"easy": 1.0, "hard": 0.0})
    assert (history.p_easy, history.p_hard) == (0.05, 0.95)


def test_trap_hard_ratio_of_zero_one_rewards() -> None:
    """Published: only groups of mean exactly 0.1 count as hard. With 0/1 rewards there are none, p_hard climbs to
    0.95 and hard prompts are hardly skipped any more."""
    all_fail = [[0.0, 0.0]] * 9 + [[0.0, 1.0]]
    ours, published = GresoHistory(PUBLISHED), GresoHistory(GresoConfig(hard_ratio="format_only"))
    assert ours.ratios(all_fail)["hard"] == 0.9
    assert published.ratios(all_fail)["hard"] == 0.0
    for _ in range(50):
        ours.adapt(ours.ratios(all_fail))
        published.adapt(published.ratios(all_fail))
    assert (ours.p_hard, published.p_hard) == (0.05, 0.95)
    for history in (ours, published):
        history.observe("p", [0.0, 0.0])
    assert ours.skip_probability("p") == pytest.approx(0.95)
    assert published.skip_probability("p") == pytest.approx(0.05)
    # where a format reward exists the two agree on it
    form_only = [[0.1, 0.1], [0.1, 1.0]]
    assert published.ratios(form_only)["hard"] == ours.ratios(form_only)["hard"] == 0.5


def test_ratios_count_groups_of_any_size() -> None:
    """Published: the metric folds rewards into groups of 8 whatever n is. Ours takes a group as it is."""
    history = GresoHistory(PUBLISHED)
    assert history.ratios([[1.0], [1.0] * 3, [0.0] * 16, [0.5] * 2]) == {"easy": 0.5, "hard": 0.25}
    assert history.ratios([]) == {"easy": 0.0, "hard": 0.0}


@pytest.mark.parametrize("n", [8, 12, 16, 32])
def test_trap_a_group_with_a_success_teaches_and_is_not_hard_however_large(n: int) -> None:
    """Published: the mean alone decides, and one success of sixteen is below 0.11."""
    history = GresoHistory(PUBLISHED)
    for successes in (1, n - 1):
        rewards = [1.0] * successes + [0.0] * (n - successes)
        history.observe("p", rewards)
        assert history.skip_probability("p") == 0.0
        assert history.ratios([rewards]) == {"easy": 0.0, "hard": 0.0}


@settings(deadline=None)
@given(st.integers(1, 256), st.integers(1, 384), st.data(), st.sampled_from([4, 8, 16]))
def test_adaptive_batch_is_the_published_formula(missing: int, judged: int, data: st.DataObject, n: int) -> None:
    """int(missing_rollouts / (1 - zero_variance_ratio) / n * 1.25) within [64, 384], n not hard-coded."""
    kept = data.draw(st.integers(1, judged))
    zero_variance_ratio = Fraction(judged - kept, judged)
    estimate = int(Fraction(missing * n) / (1 - zero_variance_ratio) / n * Fraction(5, 4))
    size, last = adaptive_batch(missing, kept, judged, 256, PUBLISHED)
    assert size == max(64, min(384, estimate))
    assert last == (estimate <= 384)


def test_an_estimate_of_exactly_the_largest_batch_is_the_last() -> None:
    assert adaptive_batch(256, 5, 6, 256, PUBLISHED) == (384, True)


def test_trap_division_by_zero_when_no_group_has_variance() -> None:
    assert adaptive_batch(256, 0, 384, 256, PUBLISHED) == (384, False)


def test_bounds_follow_the_prompts_per_step() -> None:
    assert largest_batch(256, PUBLISHED) == 384
    assert largest_batch(128, PUBLISHED) == 192
    assert adaptive_batch(1, 100, 100, 128, PUBLISHED) == (32, True)
    assert adaptive_batch(1, 1, 1, 2, PUBLISHED) == (1, True)


def test_trap_streaks_and_both_p_survive_a_checkpoint() -> None:
    history = GresoHistory(PUBLISHED)
    for prompt_id, means in {"easy": [1.0, 1.0], "hard": [0.0], "mixed": [1.0, 0.5]}.items():
        for mean in means:
            history.observe(prompt_id, [mean] * 4)
    history.adapt({"easy": 1.0, "hard": 0.0})
    resumed = GresoHistory(PUBLISHED)
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for prompt_id in ("easy", "hard", "mixed", "unseen"):
        assert resumed.skip_probability(prompt_id) == history.skip_probability(prompt_id)
    for one in (history, resumed):
        one.observe("easy", [1.0] * 4)
        one.adapt({"easy": 0.0, "hard": 0.0})
    assert resumed.state_dict() == history.state_dict()
    assert math.isclose(resumed.skip_probability("easy"), 1 - 0.5**3)


@pytest.mark.parametrize(
    "tree", [{"p_easy": 0.01}, {"p_hard": 0.99}, {"explore": 0}, {"hard_at": 0.99}, {"target": 2}, {"oversample": 0.5},
             {"min_batch": 2}, {"p_eazy": 0.5}]
)  # fmt: skip
def test_bad_configuration_is_one_clear_line(tree: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^run\.yaml: "):
        build(GresoConfig, tree, "run.yaml")
