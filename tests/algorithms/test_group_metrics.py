from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.group_metrics import (
    BUCKETS,
    ZERO_SIGNALS,
    bucket,
    group_metrics,
    in_signal_window,
    top_k_overlap,
    zero_signal_kind,
)
from lens_megatron.algorithms.rescue import RebuiltGroup, RescueConfig, rebuild_group
from lens_megatron.purification.strategies import Outcome
from lens_megatron.types import PurifiedPrompt

from .rescue_groups import binary, group

LENS = RescueConfig(mode="purification")


def rebuilt(y: list[float], again: list[float] | tuple[()] = (), name: str = "p", **options: object) -> RebuiltGroup:
    resampled = bool(options.pop("resampled", False))
    return rebuild_group(group(y, again, name, resampled), replace(LENS, **options), seed=0, step=0)


def test_a_step_by_hand() -> None:
    groups = [
        rebuilt(binary(0), binary(3), "revived"),  # Y' deleted one token
        rebuilt(binary(2), binary(8), "destroyed"),
        rebuilt(binary(1), binary(1), "not beneficial"),
        rebuilt(binary(0), (), "tied"),
        rebuilt(binary(0), (), "template only"),
        rebuilt(binary(6), binary(8), "speculative"),  # not needed, its eight rollouts thrown away
        rebuilt(binary(8), (), "solved"),
        rebuilt(binary(3), binary(5), "resampled", resampled=True, keep_failures=2),
    ]
    outcomes = [
        Outcome("revived", "purified", eligible=20, above_floor=5),
        Outcome("destroyed", "purified", eligible=10, above_floor=10),
        Outcome("tied", "tied", eligible=10, above_floor=0, tied=True),
        Outcome("template only", "nothing_eligible"),
    ]
    metrics = group_metrics(groups, outcomes)
    expected = {
        "reward": 20 / 64,
        "success": 20 / 64,
        "zero_reward_ratio": 3 / 8,
        "zero_reward_ratio_trained": 2 / 8,
        # G: 3/8; 10/10 (2 + 8, six failures left for eight); 1/8; 0; 0; 6/8; 1; 3 + 3 of 8
        "success_trained": (3 / 8 + 1 + 1 / 8 + 0 + 0 + 6 / 8 + 1 + 6 / 8) / 8,
        "purified_ratio": 4 / 8,
        "improved_ratio": 3 / 4,
        "deleted_tokens": 3.0,  # one each of three prompts; resampling deletes none
        "deleted_tokens_per_prompt": 1.0,
        "zero_signal_ratio": 4 / 8,
        "zero_signal/perfect_purification": 1 / 8,
        "zero_signal/all_tied": 1 / 8,
        "zero_signal/all_failed": 1 / 8,
        "zero_signal/all_solved": 1 / 8,
        "groups_destroyed": 1 / 8,
        "groups_revived": 1 / 8,
        "rescue/replaced": 3 / 8,
        "rescue/not_purified": 2 / 8,
        "rescue/no_room": 0.0,
        "rescue/zero_signal_fallback": 0.0,
        "rescue/signal_window": 1 / 4,  # 0 < 3 < 8 yes; 2 < 8 < 6, 1 < 1, 3 < 5 < 5 no
        "rescue/improvement": (3 / 8 + 6 / 8 + 0 + 2 / 8) / 4,
        "rescue/cancelled": 0.0,
        "rescue/discarded_rollouts": 8.0,
        "rescue/purified_rollout_share": 14 / 66,
        "success_distribution/original/failure": 3 / 8,
        "success_distribution/original/low": 2 / 8,
        "success_distribution/original/mid": 1 / 8,
        "success_distribution/original/high": 1 / 8,
        "success_distribution/original/solved": 1 / 8,
        "success_distribution/trained/failure": 2 / 8,
        "success_distribution/trained/low": 1 / 8,
        "success_distribution/trained/mid": 1 / 8,
        "success_distribution/trained/high": 2 / 8,
        "success_distribution/trained/solved": 2 / 8,
        "purification/tied": 1 / 4,
        "purification/nothing_eligible": 1 / 4,
        "purification/scores_above_floor": (5 / 20 + 1 + 0) / 3,
    }
    lengths = {
        name: metrics.pop(name) for name in ("rescue/response_tokens_failures", "rescue/response_tokens_purified")
    }
    assert metrics == pytest.approx(expected)
    assert set(metrics) == set(expected)
    # of all failures of the four prompts rolled out again, removed or not: response i has i + 1 tokens
    failures = [index + 1 for plus in (0, 2, 1, 3) for index, reward in enumerate(binary(plus)) if reward == 0]
    assert lengths["rescue/response_tokens_failures"] == pytest.approx(sum(failures) / len(failures))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(0, 8)), min_size=1, max_size=12))
def test_shares_add_up(sizes: list[tuple[int, int | None]]) -> None:
    groups = [
        rebuilt(binary(plus), () if found is None else binary(found), f"p{i}") for i, (plus, found) in enumerate(sizes)
    ]
    metrics = group_metrics(groups)
    for which in ("original", "trained"):
        assert sum(metrics[f"success_distribution/{which}/{name}"] for name in BUCKETS) == pytest.approx(1)
    assert sum(metrics[f"zero_signal/{name}"] for name in ZERO_SIGNALS) == pytest.approx(metrics["zero_signal_ratio"])
    assert metrics["zero_reward_ratio_trained"] <= metrics["zero_reward_ratio"]  # by construction
    before = sum(plus in (0, 8) for plus, _ in sizes) / len(sizes)
    change = metrics["groups_destroyed"] - metrics["groups_revived"]
    assert metrics["zero_signal_ratio"] == pytest.approx(before + change)


def test_buckets_of_eight() -> None:
    assert [bucket(successes, 8) for successes in range(9)] == [
        "failure", "low", "low", "mid", "mid", "mid", "high", "high", "solved",
    ]  # fmt: skip
    assert [bucket(s, 3) for s in range(4)] == ["failure", "mid", "mid", "solved"]  # a third and two thirds are mid


@pytest.mark.parametrize("plus", range(4))
def test_signal_window_names_the_rescues_that_teach(plus: int) -> None:
    for found in range(9):
        one = rebuilt(binary(plus), binary(found))
        assert in_signal_window(one) == (one.rescued and one.has_signal)


def test_a_cancelled_rescue_did_not_improve_and_is_not_averaged() -> None:
    whole = rebuilt(binary(0), binary(4), "whole")
    y = group(binary(3), [0.0] * 8, "cancelled")
    y = replace(y, purified=tuple(replace(r, finish="abort") if r.index > 5 else r for r in y.purified))
    cancelled = rebuild_group(y, LENS, 0, 0)
    metrics = group_metrics([whole, cancelled])
    assert metrics["purified_ratio"] == 1.0
    assert metrics["improved_ratio"] == 0.5
    assert metrics["rescue/improvement"] == 0.5
    assert metrics["rescue/cancelled"] == 1.0


def test_means_over_nothing_are_left_out() -> None:
    metrics = group_metrics([rebuilt(binary(8))])
    assert metrics["purified_ratio"] == 0.0 and metrics["deleted_tokens"] == 0.0 and metrics["improved_ratio"] == 0.0
    assert "rescue/improvement" not in metrics and "deleted_tokens_per_prompt" not in metrics
    assert not any(name.startswith("purification/") for name in metrics)


def test_zero_signal_kind_with_graded_rewards() -> None:
    assert zero_signal_kind(rebuilt([0.2, 0.2])) == "all_failed"
    assert zero_signal_kind(rebuilt([0.2, 0.3])) is None
    assert zero_signal_kind(rebuilt([0.9, 0.9])) == "all_solved"


def test_a_tied_prompt_that_solved_itself_is_not_blamed_on_ties() -> None:
    outcomes = {"p": Outcome("p", "tied", tied=True)}
    assert zero_signal_kind(rebuilt(binary(8)), outcomes) == "all_solved"
    assert zero_signal_kind(rebuilt(binary(0)), outcomes) == "all_tied"


def test_overlap_of_deletions() -> None:
    before = {"a": [1, 2, 3], "b": [4], "c": [9], "d": []}
    after = {"a": [2, 3, 5, 6], "b": [4], "e": [9], "d": []}
    assert top_k_overlap(before, after) == (2 / 4 + 1) / 2
    assert top_k_overlap({"a": [1]}, {"b": [1]}) is None


def test_deletions_against_planted_noise_by_hand() -> None:
    def one(name: str, noise: tuple[int, ...], deleted: tuple[int, ...] | None) -> tuple[RebuiltGroup, Outcome]:
        whole = group(binary(0), binary(3), name)
        prompt = replace(whole.prompt, planted=noise)
        purified = None if deleted is None else PurifiedPrompt(name, (1,), deleted)
        made = rebuild_group(replace(whole, prompt=prompt), LENS, seed=0, step=0)
        return made, Outcome(name, "purified" if deleted else "tied", purified, eligible=20)

    pairs = [one("a", (2, 5), (2, 9, 11)), one("b", (7,), (7, 8)), one("clean", (), (3,)), one("tied", (4, 5), None)]
    metrics = group_metrics([made for made, _ in pairs], [outcome for _, outcome in pairs])
    assert metrics["purification/planted_precision"] == pytest.approx(2 / 5)
    assert metrics["purification/planted_recall"] == pytest.approx(2 / 3)
    assert metrics["purification/planted_chance"] == pytest.approx(3 / 40)
    assert "purification/planted_precision" not in group_metrics([pairs[2][0]], [pairs[2][1]])  # no noise: not 0


def test_the_overlap_does_not_depend_on_where_a_process_puts_strings_in_a_set() -> None:
    class Id(str):
        place: int

        def __hash__(self) -> int:
            return self.place

    def overlap(places: dict[str, int]) -> float | None:
        shares = {"a": ([1, 2, 3], [1]), "b": ([1, 2, 3], [1, 2]), "c": ([1, 2], [1])}
        ids = {name: Id(name) for name in shares}
        for name, place in places.items():
            ids[name].place = place
        before, after = ({ids[name]: pair[k] for name, pair in shares.items()} for k in (0, 1))
        return top_k_overlap(before, after)

    orders = [dict(zip("abc", places, strict=True)) for places in itertools.permutations(range(3))]
    assert len({overlap(places) for places in orders}) == 1
    assert len({sum(shares) for shares in itertools.permutations([1 / 3, 2 / 3, 1 / 2])}) == 2, "or nothing is shown"
