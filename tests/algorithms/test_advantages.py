"""Eq. 4 and 6 against exact fractions, and the closed forms that notes on CRPO derive from them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.advantages import (
    AdvantageConfig,
    BaselineTerms,
    OverlongConfig,
    group_advantages,
    overlong_penalty,
)
from lens_megatron.algorithms.rescue import RescueConfig, rebuild_group
from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout

EQ6 = AdvantageConfig(std="population", weights="all", epsilon=0.0)


def members(successes: int, failures: int, purified: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, success and purified of a rebuilt group: Y+, then kept failures, then P."""
    rewards = torch.tensor([1.0] * successes + [0.0] * failures + [1.0] * purified, dtype=torch.float64)
    is_purified = torch.tensor([False] * (successes + failures) + [True] * purified)
    return rewards, rewards > 0.5, is_purified


def rescued(m: int, successes: int, found: int) -> tuple[tuple[torch.Tensor, ...], Fraction]:
    """Eq. 3 with |P| = found, and a."""
    return members(successes, max(0, m - successes - found), found), Fraction(successes, m)


def test_eq_4_and_6_by_hand() -> None:
    """a = 1/4 of m = 4, |P| = 2: w~ = 1/4 on Y+, 3/4 on P and on the failure left; w = 1/10, 3/10, 3/10, 3/10."""
    (rewards, success, purified), a = rescued(4, 1, 2)
    result = group_advantages(rewards, success, purified, float(a), EQ6)
    assert result.weights_M.tolist() == [0.25, 0.75, 0.75, 0.75]
    std = math.sqrt(0.7 * 0.3**2 + 0.3 * 0.7**2)  # weighted mean 7/10
    assert result.advantages_M.tolist() == pytest.approx([0.3 / std, -0.7 / std, 0.3 / std, 0.3 / std])


@pytest.mark.parametrize(
    ("weights", "rescued_group", "plain_group"),
    [
        ("all", [0.25, 0.75, 0.75], [0.25, 0.75]),
        ("rescued_only", [0.25, 0.75, 0.75], [1.0, 1.0]),
        ("purified_only", [1.0, 1.0, 0.75], [1.0, 1.0]),
        ("none", [1.0, 1.0, 1.0], [1.0, 1.0]),
    ],
)
def test_where_eq_4_applies(weights: str, rescued_group: list[float], plain_group: list[float]) -> None:
    """A success of x, a failure and, where the group was rescued, a purified success; a = 1/4."""
    config = AdvantageConfig(weights=weights)
    for purified, expected in ((1, rescued_group), (0, plain_group)):
        assert group_advantages(*members(1, 1, purified), 0.25, config).weights_M.tolist() == expected


graded = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from(["success", "failure", "purified"])), min_size=2, max_size=12
)


@settings(deadline=None)
@given(graded, st.integers(0, 8), st.sampled_from(["all", "none", "rescued_only", "purified_only"]), st.booleans())
def test_weighted_advantage_against_exact_fractions(
    rows: list[tuple[int, str]], eighths: int, weights: str, unbiased: bool
) -> None:
    a = Fraction(eighths, 8)
    rewards = [Fraction(reward, 8) for reward, _ in rows]
    is_rescued = any(kind == "purified" for _, kind in rows)

    def weight(kind: str) -> Fraction:
        if weights == "none" or (weights == "rescued_only" and not is_rescued):
            return Fraction(1)
        if weights == "purified_only":
            return 1 - a if kind == "purified" else Fraction(1)
        return a if kind == "success" else 1 - a

    raw = [weight(kind) for _, kind in rows]
    if sum(raw) == 0:
        return
    w = [value / sum(raw) for value in raw]
    mean = sum(wi * r for wi, r in zip(w, rewards, strict=True))
    variance = sum(wi * (r - mean) ** 2 for wi, r in zip(w, rewards, strict=True))
    if unbiased:
        left = 1 - sum(wi**2 for wi in w)
        if left == 0:
            return
        variance /= left
    config = AdvantageConfig(std="unbiased" if unbiased else "population", weights=weights)
    result = group_advantages(
        torch.tensor([float(r) for r in rewards], dtype=torch.float64),
        torch.tensor([kind != "failure" for _, kind in rows]),
        torch.tensor([kind == "purified" for _, kind in rows]),
        float(a),
        config,
    )
    spread = len(set(rewards)) > 1
    expected = [float(r - mean) / (math.sqrt(variance) + 1e-6) if spread else 0.0 for r in rewards]
    assert result.weights_M.tolist() == pytest.approx([float(value) for value in raw])
    assert result.advantages_M.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-7)
    weighted_mean = (result.weights_M * result.advantages_M).sum() / result.weights_M.sum()
    assert weighted_mean.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("successes", range(9))
def test_a_group_that_was_not_purified_gets_a_grpo_without_std(successes: int) -> None:
    (rewards, success, purified), a = rescued(8, successes, 0)
    result = group_advantages(rewards, success, purified, float(a), EQ6)
    product = result.weights_M * result.advantages_M
    torch.testing.assert_close(product, rewards - rewards.mean())
    assert product.abs().sum().item() == pytest.approx(16 * float(a * (1 - a)))


@pytest.mark.parametrize(("successes", "found"), [(k, p) for k in range(4) for p in range(1, 9)])
def test_rescued_group_has_its_closed_form_and_its_window(successes: int, found: int) -> None:
    """w~A: (1-a) sqrt(W-/W+) on P, a sqrt(W-/W+) on Y+, -(1-a) sqrt(W+/W-) on failures; none left, no signal."""
    (rewards, success, purified), fraction = rescued(8, successes, found)
    a, kept = float(fraction), max(0, 8 - successes - found)
    result = group_advantages(rewards, success, purified, a, EQ6)
    product = result.weights_M * result.advantages_M
    if kept == 0:  # |P| >= m (1 - a): the upper edge of the signal window
        assert (product == 0).all()
        return
    up, down = a * successes + (1 - a) * found, (1 - a) * kept
    root = math.sqrt(down / up)
    expected = [a * root] * successes + [-(1 - a) / root] * kept + [(1 - a) * root] * found
    torch.testing.assert_close(product, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("successes", "found", "expected"), [(1, 6, -2.17), (0, 7, -2.65)])
def test_the_one_failure_left_gets_a_large_negative_push(successes: int, found: int, expected: float) -> None:
    (rewards, success, purified), a = rescued(8, successes, found)
    result = group_advantages(rewards, success, purified, float(a), EQ6)
    product = result.weights_M * result.advantages_M
    assert product[rewards == 0].tolist() == [pytest.approx(expected, abs=0.005)]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_lens_without_weights_on_a_group_never_rescued_is_grpo(rewards: list[float]) -> None:
    """tau = 0 rescues nothing; with weights off and the same std the advantage is bit for bit GRPO's."""
    prompt = Prompt("p", (1, 2, 3), (0, 3), "")
    rollouts = tuple(
        Rollout("p", (1, 2, 3), (4,), (-1.0,), "stop", i, reward=reward) for i, reward in enumerate(rewards)
    )
    again = tuple(
        Rollout("p", (1, 3), (4,), (-1.0,), "stop", i, purified=True, reward=1.0) for i in range(len(rewards))
    )
    group = Group(prompt, rollouts, PurifiedPrompt("p", (1, 3), (1,)), again)  # all of P would join at tau > 0
    rebuilt = rebuild_group(group, RescueConfig(mode="purification", tau=0.0), seed=0, step=0)
    found = group_advantages(
        torch.tensor([member.rollout.reward for member in rebuilt.members], dtype=torch.float64),
        torch.tensor([member.success for member in rebuilt.members]),
        torch.tensor([member.origin.startswith("purified") for member in rebuilt.members]),
        rebuilt.success_rate,
        AdvantageConfig(std="unbiased", weights="none"),
    )
    r = torch.tensor(rewards, dtype=torch.float64)
    if max(rewards) - min(rewards) <= 1e-6:
        assert (found.advantages_M == 0).all()
    else:
        torch.testing.assert_close(found.advantages_M, (r - r.mean()) / (r.std() + 1e-6))
    assert (found.weights_M == 1).all()


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])
    nobody = torch.zeros(4, dtype=torch.bool)
    result = group_advantages(rewards, rewards > 0.5, nobody, 0.5, AdvantageConfig("leave_one_out", "none"))
    assert result.advantages_M.tolist() == pytest.approx([1 - 0.5, 0 - 2.5 / 3, 0.5 - 2 / 3, 1 - 0.5])


def test_baseline_of_the_originals_is_positive_only_where_they_all_failed() -> None:
    config = AdvantageConfig(baseline="original", std="none")
    (rewards, success, purified), a = rescued(8, 0, 3)
    assert group_advantages(rewards, success, purified, float(a), config).advantages_M.tolist() == [0.0] * 5 + [1.0] * 3
    (rewards, success, purified), a = rescued(8, 2, 8)  # no failure left: still a signal, unlike Eq. 6
    assert group_advantages(rewards, success, purified, float(a), config).advantages_M.tolist() == [0.75] * 10
    graded_result = group_advantages(rewards, success, purified, float(a), config, original_mean=0.4)
    assert graded_result.advantages_M.tolist() == pytest.approx([0.6] * 10)


def half(terms: BaselineTerms) -> torch.Tensor:
    return torch.full_like(terms.rewards_M, 0.5)


def test_a_baseline_of_ones_own_is_asked_about_equal_rewards_too() -> None:
    own = f"{__name__}:half"
    nobody = torch.zeros(4, dtype=torch.bool)
    for config, expected in ((AdvantageConfig(own, "none"), 0.5), (AdvantageConfig(own), 0.0)):  # no std of equal ones
        for reward in (1.0, 0.0):
            rewards = torch.full((4,), reward)
            found = group_advantages(rewards, rewards > 0.5, nobody, reward, config).advantages_M
            assert found.tolist() == [expected if reward else -expected] * 4
    assert AdvantageConfig(own, "none").learns_from == "any"
    assert AdvantageConfig(own).learns_from == AdvantageConfig().learns_from == "spread"


@pytest.mark.parametrize("weights", ["all", "none"])
def test_equal_rewards_give_exactly_zero_in_float32(weights: str) -> None:
    """A float32 weighted mean of ones is off by 6e-8, which over a std of 0 + 1e-6 would be an advantage of 0.06."""
    for successes in range(1, 8):
        rewards = torch.ones(11)
        purified = torch.arange(11) >= successes
        result = group_advantages(
            rewards, purified | ~purified, purified, successes / 8, AdvantageConfig(weights=weights)
        )
        assert (result.advantages_M == 0).all() and result.advantages_M.dtype == torch.float32


def test_nearly_equal_rewards_keep_their_advantage_in_float32() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0 - 2e-5, 1.0 - 3e-5])
    nobody = torch.zeros(5, dtype=torch.bool)
    single, double = (group_advantages(r, r > 0.5, nobody, 0.3, EQ6).advantages_M for r in (rewards, rewards.double()))
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


def test_unbiased_and_population_std_differ_by_their_known_factor() -> None:
    rewards, nobody = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.bool)
    by_std = {
        std: group_advantages(rewards, rewards > 0.5, nobody, 0.25, AdvantageConfig(std=std, epsilon=0.0)).advantages_M
        for std in ("unbiased", "population")
    }
    torch.testing.assert_close(by_std["population"], by_std["unbiased"] * math.sqrt(4 / 3))
    torch.testing.assert_close(by_std["unbiased"], (rewards - 0.25) / rewards.std())


def test_overlong_penalty_at_dapos_numbers() -> None:
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    penalty = overlong_penalty(lengths, 20480, OverlongConfig(buffer_tokens=4096, penalty=1.0))
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"baseline": "median"}, "none of group"),
        ({"baseline": "original"}, "std: none"),
        ({"epsilon": -1.0}, "negative"),
    ],
)
def test_meaningless_advantages_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AdvantageConfig(**values)  # type: ignore[arg-type]
