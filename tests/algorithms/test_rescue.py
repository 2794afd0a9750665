"""Eq. 2 and 3 by enumeration and against a slow reference."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.rescue import (
    RebuiltGroup,
    RescueConfig,
    needs_rescue,
    rebuild_group,
    rescue_is_certain,
    rescue_is_moot,
)
from lens_megatron.errors import UsageError
from lens_megatron.purification.config import PurificationConfig
from lens_megatron.strict import build
from lens_megatron.types import Group

from .rescue_groups import X_PRIME, X, binary, group

LENS = RescueConfig(mode="purification")
TAUS = (0.125, 0.25, 0.375, 0.5)


def rebuild(y: Group, config: RescueConfig = LENS, seed: int = 0, step: int = 0) -> RebuiltGroup:
    return rebuild_group(y, config, seed, step)


def counts(rebuilt: RebuiltGroup) -> tuple[int, int, int]:
    """|Y+|, kept failures, |P used|."""
    origins = Counter(member.origin for member in rebuilt.members)
    assert sum(origins.values()) == len(rebuilt.members)
    return origins["success"], origins["failure"], origins["purified"]


# ------------------------------------------------------------------------------------------- the paper's equations


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("plus", "found"), list(itertools.product(range(9), range(9))))
def test_algorithm_1_for_every_group_of_eight(plus: int, found: int, tau: float) -> None:
    rebuilt = rebuild(group(binary(plus), binary(found)), replace(LENS, tau=tau))
    minus = 8 - plus
    if Fraction(plus, 8) < Fraction(tau) and found > plus:
        assert counts(rebuilt) == (plus, minus - min(minus, found), found)
        assert rebuilt.why == "replaced"
    else:
        assert counts(rebuilt) == (plus, minus, 0)
        assert rebuilt.why == ("not_beneficial" if plus < 8 * tau else "enough_success")
    assert rebuilt.success_rate == plus / 8  # of Y, also when G has changed


@pytest.mark.parametrize(("plus", "found"), list(itertools.product(range(9), range(9))))
def test_signal_window_is_the_closed_form(plus: int, found: int) -> None:
    """m a < |P| < m (1 - a): a rescued group teaches inside it only (tau out of the way)."""
    rebuilt = rebuild(group(binary(plus), binary(found)), replace(LENS, tau=1.0))
    a = Fraction(plus, 8)
    assert (rebuilt.rescued and rebuilt.has_signal) == (8 * a < found < 8 * (1 - a))


def test_the_windows_that_the_analysis_prints() -> None:
    windows = {
        plus: [
            found
            for found in range(9)
            if (rebuilt := rebuild(group(binary(plus), binary(found)))).rescued and rebuilt.has_signal
        ]
        for plus in range(4)
    }
    assert windows == {0: [1, 2, 3, 4, 5, 6, 7], 1: [2, 3, 4, 5, 6], 2: [3, 4, 5], 3: [4]}


def test_more_successes_than_failures_make_a_larger_group() -> None:
    y = group(binary(3), binary(7))
    assert counts(rebuild(y)) == (3, 0, 7)
    assert len(rebuild(y).removed) == 5
    assert counts(rebuild(y, replace(LENS, replacement="one_to_one"))) == (3, 0, 5)


def test_nothing_to_do() -> None:
    assert rebuild(group(binary(8), binary(8))).why == "enough_success"  # a = 1
    assert rebuild(group(binary(4), binary(8))).why == "enough_success"  # a = tau: strict
    assert rebuild(group(binary(0))).why == "not_purified"  # all scores tied, say
    assert rebuild(group(binary(0), binary(0))).why == "not_beneficial"  # empty P
    assert rebuild(group(binary(3), binary(3))).why == "not_beneficial"  # Eq. 2 is strict
    assert rebuild(group(binary(0), binary(8)), replace(LENS, mode="none")).why == "off"
    for y in (group(binary(4), binary(8)), group(binary(0), binary(0)), group(binary(3), binary(3))):
        assert [member.rollout for member in rebuild(y).members] == list(y.originals)


def test_without_the_benefit_check_fewer_successes_join_too() -> None:
    unchecked = replace(LENS, benefit_check=False)
    rebuilt = rebuild(group(binary(3), binary(1)), unchecked)
    assert counts(rebuilt) == (3, 4, 1)
    assert (rebuilt.rescued, rebuilt.improved) == (True, False)
    assert rebuild(group(binary(3), binary(0)), unchecked).why == "no_success"


# ------------------------------------------------------------------------------------------------ all options at once

options = st.builds(
    RescueConfig,
    mode=st.just("purification"),
    tau=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    success_threshold=st.sampled_from([0.3, 0.7, 1.0]),
    benefit_check=st.booleans(),
    replacement=st.sampled_from(["all", "one_to_one"]),
    keep_failures=st.integers(0, 4),
    max_success_share=st.sampled_from([0.3, 0.5, 0.7, 1.0]),
    zero_signal=st.sampled_from(["keep", "original"]),
)
tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)


def slow_sizes(y: list[float], again: list[float], config: RescueConfig) -> tuple[int, int, int, bool]:
    """|Y+|, |Y- kept|, |P used| and whether G = Y, by moving one rollout at a time."""
    plus = sum(round(10 * r) >= round(10 * config.success_threshold) for r in y)
    found = sum(round(10 * r) >= round(10 * config.success_threshold) for r in again)
    unchanged = (plus, len(y) - plus, 0, True)
    if not Fraction(plus, len(y)) < Fraction(str(config.tau)) or not again or not found:
        return unchanged
    if config.benefit_check and found <= plus:
        return unchanged
    minus, used = len(y) - plus, 0
    for _ in range(found):
        may_leave = minus > config.keep_failures
        under_share = Fraction(plus + used + 1, len(y)) <= Fraction(str(config.max_success_share))
        if config.keep_failures and not may_leave:
            break
        if config.max_success_share < 1 and not under_share:
            break
        if config.replacement == "one_to_one" and minus == 0:
            break
        used += 1
        minus = max(0, minus - 1)
    return (plus, minus, used, False) if used else unchanged


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 8).flatmap(lambda m: st.tuples(*[st.lists(tenths, min_size=m, max_size=m)] * 2)), options)
def test_every_option_against_a_slow_reference(rewards: tuple[list[float], list[float]], config: RescueConfig) -> None:
    y, again = rewards
    rebuilt = rebuild(group(y, again), config)
    plus, minus, used, unchanged = slow_sizes(y, again, config)
    if not unchanged and config.zero_signal == "original" and rebuilt.why == "zero_signal":
        assert plus > 0
        literal = rebuild(group(y, again), replace(config, zero_signal="keep"))
        assert len({member.rollout.reward for member in literal.members}) == 1
        unchanged, minus, used = True, len(y) - plus, 0
    assert counts(rebuilt) == (plus, minus, used)
    assert rebuilt.rescued != unchanged
    members = [member.rollout for member in rebuilt.members]
    assert len({(rollout.purified, rollout.index) for rollout in members}) == len(members)
    assert all(member.rollout.purified == (member.origin == "purified") for member in rebuilt.members)
    assert all(member.success == (member.origin != "failure") for member in rebuilt.members)
    assert Counter(r.index for r in rebuilt.removed) == Counter(range(len(y))) - Counter(
        r.index for r in members if not r.purified
    )


def test_keep_failures() -> None:
    keep = replace(LENS, keep_failures=2)
    assert counts(rebuild(group(binary(0), binary(8)), keep)) == (0, 2, 6)
    assert counts(rebuild(group(binary(3), binary(4)), keep)) == (3, 2, 3)
    assert counts(rebuild(group(binary(1), binary(3)), keep)) == (1, 4, 3)
    no_room = rebuild(group(binary(3), binary(8)), replace(LENS, keep_failures=5))
    assert (no_room.why, counts(no_room)) == ("no_room", (3, 5, 0))


def test_max_success_share() -> None:
    assert counts(rebuild(group(binary(1), binary(8)), replace(LENS, max_success_share=0.5))) == (1, 4, 3)
    # 29 of 100, though 0.29 * 100 is 28.999999999999996
    assert counts(rebuild(group(binary(0, 100), binary(90, 100)), replace(LENS, max_success_share=0.29))) == (0, 71, 29)
    assert rebuild(group(binary(3), binary(8)), replace(LENS, max_success_share=0.375)).why == "no_room"


def test_zero_signal_falls_back_where_the_original_group_teaches() -> None:
    original = replace(LENS, zero_signal="original")
    assert not rebuild(group(binary(2), binary(8))).has_signal
    fallen_back = rebuild(group(binary(2), binary(8)), original)
    assert (fallen_back.why, counts(fallen_back)) == ("zero_signal", (2, 6, 0))
    assert fallen_back.has_signal
    # a = 0: Y teaches nothing either
    assert rebuild(group(binary(0), binary(8)), original).why == "replaced"
    assert rebuild(group(binary(2), binary(5)), original).why == "replaced"
    # against the mean of Y, 2/8, successes alone teach: nothing to take back
    against = rebuild_group(group(binary(2), binary(8)), original, seed=0, step=0, learns_from="original")
    assert against.why == "replaced" and against.has_signal
    # what a baseline of one's own makes of equal rewards nobody knows
    anything = rebuild_group(group(binary(2), binary(8)), original, seed=0, step=0, learns_from="any")
    assert anything.why == "replaced" and anything.has_signal


def test_union_keeps_every_rollout() -> None:
    rebuilt = rebuild(group(binary(1), binary(3)), replace(LENS, replacement="union"))
    assert Counter(member.origin for member in rebuilt.members) == {
        "success": 1, "failure": 7, "purified": 3, "purified_failure": 5,
    }  # fmt: skip
    assert rebuilt.removed == ()
    checked = rebuild(group(binary(3), binary(3)), replace(LENS, replacement="union"))
    assert checked.why == "not_beneficial"
    unchecked = replace(LENS, replacement="union", benefit_check=False)
    assert len(rebuild(group(binary(3), binary(0)), unchecked).members) == 16


# ------------------------------------------------------------------------------------------------------ graded rewards


def test_graded_rewards() -> None:
    config = replace(LENS, success_threshold=0.8)
    y = [0.7, 0.1, 0.0, 0.8, 0.3, 0.3, 0.2, 0.79]  # one success
    again = [0.9, 0.8, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]  # two, though its mean is lower
    assert sum(again) < sum(y)
    rebuilt = rebuild(group(y, again), config)
    assert counts(rebuilt) == (1, 5, 2)
    assert rebuilt.success_rate == 1 / 8 and rebuilt.purified_success_rate == 2 / 8
    # failures with different partial credit: no success, but a signal
    assert rebuild(group([0.1, 0.2, 0.0]), config).has_signal
    assert not rebuild(group([0.1, 0.1, 0.1]), config).has_signal
    # perfect purification with different credit for the successes still has one
    assert rebuild(group([0.0, 0.0], [0.8, 1.0]), config).has_signal


def test_a_reward_that_is_the_threshold_up_to_rounding_succeeds() -> None:
    assert 0.8 - 0.1 != 0.7 and 1 - 0.9 < 0.1
    assert needs_rescue([1 - 0.9] * 4, replace(LENS, success_threshold=0.1)) is False


# --------------------------------------------------------------------------------------------------- the sampler's view


@pytest.mark.parametrize("tau", [*TAUS, 0.3, 1.0])
def test_certain_and_moot_agree_with_every_way_the_rest_can_end(tau: float) -> None:
    config = replace(LENS, tau=tau)
    for done in range(9):
        for successes in range(done + 1):
            finished = [1.0] * successes + [0.0] * (done - successes)
            ends = {
                needs_rescue(finished + [1.0] * more + [0.0] * (8 - done - more), config)
                for more in range(8 - done + 1)
            }
            assert rescue_is_certain(finished, 8, config) == (ends == {True})
            assert rescue_is_moot(finished, 8, config) == (ends == {False})


def test_tau_is_strict_at_every_eighth() -> None:
    for successes in range(9):
        for eighths in range(9):
            assert needs_rescue(binary(successes), replace(LENS, tau=eighths / 8)) == (successes < eighths)
    # 0.3 * 10 is 3.0000000000000004 in some orders of arithmetic; 3 of 10 is not below 0.3
    for n, tau in ((10, 0.3), (10, 0.7), (100, 0.29), (3, 1 / 3)):
        assert not needs_rescue(binary(round(n * tau), n), replace(LENS, tau=tau))


def test_mode_none_never_rescues() -> None:
    off = RescueConfig()
    assert not needs_rescue([0.0] * 8, off)
    assert not rescue_is_certain([0.0] * 8, 8, off)
    assert rescue_is_moot([], 8, off)


# ---------------------------------------------------------------------------------------------------- random choices


def test_leaving_and_joining_are_uniform_over_all_and_not_the_first_finished() -> None:
    y = group(binary(2), binary(5))
    config = replace(LENS, max_success_share=0.5)  # 2 of 5 join, 2 of 6 leave
    steps = 600
    joined, left = Counter(), Counter()
    for step in range(steps):
        rebuilt = rebuild(y, config, step=step)
        joined.update(m.rollout.index for m in rebuilt.members if m.origin == "purified")
        left.update(rollout.index for rollout in rebuilt.removed)
    assert set(joined) == {r.index for r in y.purified if r.reward == 1}
    assert set(left) == {r.index for r in y.originals if r.reward == 0}
    for counter in (joined, left):
        share = 2 / len(counter)
        assert all(abs(n - steps * share) < 4.5 * math.sqrt(steps * share * (1 - share)) for n in counter.values())


def test_order_of_arrival_changes_nothing() -> None:
    y = group(binary(2), binary(5))
    config = replace(LENS, keep_failures=3)
    generator = random.Random(0)
    for _ in range(20):
        shuffled = replace(
            y,
            originals=tuple(generator.sample(y.originals, 8)),
            purified=tuple(generator.sample(y.purified, 8)),
        )
        assert rebuild(shuffled, config).members == rebuild(y, config).members


def test_seed_step_and_prompt_decide() -> None:
    config = replace(LENS, keep_failures=4)

    def joined(seed: int, step: int, prompt_id: str) -> list[int]:
        rebuilt = rebuild(group(binary(0), binary(8), prompt_id), config, seed, step)
        return [member.rollout.index for member in rebuilt.members]

    base = [joined(0, step, "p") for step in range(8)]
    assert base == [joined(0, step, "p") for step in range(8)]
    assert base != [joined(1, step, "p") for step in range(8)]
    assert base != [joined(0, step, "q") for step in range(8)]
    assert len({tuple(choice) for choice in base}) > 1


# -------------------------------------------------------------------------------------------- who was sampled where


def test_every_member_keeps_the_prompt_it_was_sampled_under() -> None:
    for member in rebuild(group(binary(1), binary(4))).members:
        assert member.rollout.roll_tokens == (X_PRIME if member.origin == "purified" else X)
    resampled = rebuild(group(binary(1), binary(4), resampled=True))
    assert counts(resampled) == (1, 3, 4)
    assert all(member.rollout.roll_tokens == X for member in resampled.members)
    assert sum(member.rollout.purified for member in resampled.members) == 4  # metrics can tell them apart


def test_a_speculative_rescue_that_was_not_needed_is_discarded_whole() -> None:
    rebuilt = rebuild(group(binary(5), binary(8)))
    assert not rebuilt.rolled_out_again
    assert rebuilt.purified_success_rate is None
    assert all(not member.rollout.purified for member in rebuilt.members)


def broken_groups() -> list[tuple[str, Group]]:
    y = group(binary(1), binary(4))
    aborted = replace(y.originals[0], finish="abort")
    return [
        ("3 rescue rollouts for 8", replace(y, purified=y.purified[:3])),
        ("same index", replace(y, originals=(*y.originals[:7], y.originals[0]))),
        ("original rollout was aborted", replace(y, originals=(aborted, *y.originals[1:]))),
        ("no rollout", replace(y, originals=())),
        ("other prompt", replace(y, purified=tuple(replace(r, roll_tokens=X) for r in y.purified))),
        ("other prompt", replace(y, purified=tuple(replace(r, purified=False) for r in y.purified))),
        ("other prompt", replace(y, originals=tuple(replace(r, purified=True) for r in y.originals))),
        ("has a reward", replace(y, purified=tuple(replace(r, finish="abort") for r in y.purified))),
    ]


@pytest.mark.parametrize(("message", "broken"), broken_groups())
def test_broken_groups_are_refused(message: str, broken: Group) -> None:
    with pytest.raises(ValueError, match=message):
        rebuild(broken)


def test_rescue_keys_include_those_of_purification() -> None:
    config = build(RescueConfig, {"mode": "purification", "tau": 0.25, "gamma": 0.05, "strategy": "random"}, "run.yaml")
    assert isinstance(config, PurificationConfig)
    assert (config.tau, config.gamma, config.strategy) == (0.25, 0.05, "random")


@pytest.mark.parametrize(
    "tree",
    [
        {"tau": 1.5}, {"success_threshold": 0}, {"keep_failures": -1}, {"max_success_share": 0}, {"gamma": 2},
        {"replacement": "union", "keep_failures": 1}, {"taus": 0.5},
    ],
)  # fmt: skip
def test_bad_configuration_is_one_clear_line(tree: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^run\.yaml: "):
        build(RescueConfig, tree, "run.yaml")
