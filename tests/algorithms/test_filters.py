"""The filter slot, driven as the loop drives it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.filters import FilterConfig, NotEnoughGroups, PromptFilter
from lens_megatron.algorithms.greso import GresoConfig
from lens_megatron.algorithms.rescue import RebuiltGroup, RescueConfig, rebuild_group
from lens_megatron.config import RunConfig
from lens_megatron.data.config import DataConfig
from lens_megatron.errors import UsageError
from lens_megatron.guards.config import GuardConfig
from lens_megatron.host import Host
from lens_megatron.presets import load_algorithm
from lens_megatron.rollout.sampling import SampleCounts, SampleResult
from lens_megatron.samples import samples_of_group
from lens_megatron.strict import build

from .rescue_groups import group

Rewards = Callable[[str], list[float]]
NO_RESCUE = RescueConfig()


def endless(epoch: int = 0) -> Iterator[str]:
    number = 0
    while True:
        yield f"p{number}"
        number += 1


def around(size: int) -> Iterator[str]:
    while True:
        yield from (f"p{number}" for number in range(size))


def mixed(prompt_id: str) -> list[float]:
    """A third has variance."""
    kind = int(prompt_id[1:]) % 3
    return [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]][kind]


def run_step(
    prompts: PromptFilter,
    ids: Iterator[str],
    rewards: Rewards,
    step: int = 0,
    epoch: int = 0,
    again: Rewards | None = None,
    rescue: RescueConfig = NO_RESCUE,
    order: random.Random | None = None,
) -> tuple[list[RebuiltGroup], list[int]]:
    """The loop of the module's docstring. `order` shuffles the groups as if they had finished in any order."""
    sizes = []
    prompts.begin_step(step, epoch)
    while (size := prompts.next_batch_size()) is not None:
        sizes.append(size)
        chosen: list[str] = []
        while len(chosen) < size:
            candidates = [next(ids) for _ in range(size - len(chosen))]
            chosen += [p for p, wanted in zip(candidates, prompts.propose(candidates), strict=True) if wanted]
        groups = [
            rebuild_group(group(rewards(p), again(p) if again else (), p), rescue, seed=0, step=step) for p in chosen
        ]
        if order:
            order.shuffle(groups)
        half = len(groups) // 2  # in portions, as they arrive
        prompts.accept(groups[:half])
        prompts.accept(groups[half:])
    return prompts.finish(), sizes


def ids_of(groups: list[RebuiltGroup]) -> list[str]:
    return [one.group.prompt.id for one in groups]


def test_none_trains_on_every_group_once() -> None:
    groups, sizes = run_step(PromptFilter(FilterConfig(), 5, 0), endless(), mixed)
    assert sizes == [5]
    assert ids_of(groups) == ["p0", "p1", "p2", "p3", "p4"]


# ----------------------------------------------------------------------------------------------- dynamic sampling

DYNAMIC = FilterConfig(mode="dynamic")


def test_dynamic_sampling_generates_three_times_and_cuts_the_surplus() -> None:
    groups, sizes = run_step(PromptFilter(DYNAMIC, 4, 0), endless(), lambda p: [1.0, 0.0])
    assert sizes == [12]
    assert ids_of(groups) == ["p0", "p1", "p2", "p3"]


def test_published_batch_of_dapo() -> None:
    prompts = PromptFilter(DYNAMIC, 512, 0)
    prompts.begin_step(0, 0)
    assert prompts.next_batch_size() == 1536


def test_dynamic_sampling_keeps_groups_with_variance_only() -> None:
    prompts = PromptFilter(replace(DYNAMIC, size_factor=1.0), 4, 0)
    groups, sizes = run_step(prompts, endless(), mixed)
    assert ids_of(groups) == ["p0", "p3", "p6", "p9"]
    assert sizes == [4, 4, 4]  # as many batches as it takes
    assert prompts.metrics()["filter/dropped"] == 8


def test_dynamic_sampling_gives_up_after_max_batches() -> None:
    prompts = PromptFilter(replace(DYNAMIC, size_factor=1.0), 4, 0)
    drawn: list[str] = []
    with pytest.raises(NotEnoughGroups, match=r"step 1: only 0 of 4 groups .* after 10 batches.*every reward was 0"):
        run_step(prompts, endless(), lambda p: drawn.append(p) or [0.0, 0.0])
    assert len(drawn) == 40
    prompts = PromptFilter(replace(DYNAMIC, size_factor=1.0), 4, 0)
    with pytest.raises(NotEnoughGroups, match=r"too easy or too hard\? Raise algorithm\.filter\.max_batches"):
        run_step(prompts, endless(), lambda p: [1.0, 1.0])


def test_the_tenth_batch_still_counts() -> None:
    prompts = PromptFilter(replace(DYNAMIC, size_factor=1.0), 10, 0)
    groups, sizes = run_step(prompts, endless(), lambda p: [1.0, 0.0] if p.endswith("9") else [0.0, 0.0])
    assert len(sizes) == 10 and len(groups) == 10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["none", "dynamic", "greso", "greso_dynamic"]))
def test_trap_fastest_first(seed: int, mode: str) -> None:
    """Groups that finish first are short. Whatever the order of arrival, the same groups train, in prompt order."""
    config = FilterConfig(mode=mode)
    in_order, _ = run_step(PromptFilter(config, 6, 0), endless(), mixed)
    shuffled, _ = run_step(PromptFilter(config, 6, 0), endless(), mixed, order=random.Random(seed))
    assert ids_of(shuffled) == ids_of(in_order)
    assert ids_of(in_order) == sorted(ids_of(in_order), key=lambda prompt_id: int(prompt_id[1:]))


def test_a_batch_is_judged_whole() -> None:
    prompts = PromptFilter(DYNAMIC, 1, 0)
    prompts.begin_step(0, 0)
    assert prompts.next_batch_size() == 3
    prompts.propose(["a", "b", "c"])
    fast = [rebuild_group(group([1.0, 0.0], prompt_id="c"), NO_RESCUE, 0, 0)]
    assert len(prompts.accept(fast)) == 1  # enough to train on, were it not for the slower ones
    with pytest.raises(RuntimeError, match="whole"):
        prompts.next_batch_size()
    with pytest.raises(RuntimeError, match="not over"):
        prompts.finish()
    slow = [rebuild_group(group([1.0, 0.0], prompt_id=p), NO_RESCUE, 0, 0) for p in ("b", "a")]
    prompts.accept(slow)
    assert prompts.next_batch_size() is None
    assert ids_of(prompts.finish()) == ["a"]


def test_misuse_is_refused() -> None:
    prompts = PromptFilter(FilterConfig(), 2, 0)
    prompts.begin_step(0, 0)
    with pytest.raises(ValueError, match="fit in this batch"):
        prompts.propose(["a"])  # before a batch was sized
    prompts.next_batch_size()
    with pytest.raises(ValueError, match="fit in this batch"):
        prompts.propose(["a", "b", "c"])
    prompts.propose(["a", "b"])
    judged = rebuild_group(group([1.0], prompt_id="a"), NO_RESCUE, 0, 0)
    prompts.accept([judged])
    with pytest.raises(ValueError, match="judged already"):
        prompts.accept([judged])


def test_trap_std_of_equal_floats_is_not_zero() -> None:
    """Eight rewards of 0.1 have a computed std above 0: `std > 0` would keep a group without a signal."""
    rewards = [0.1] * 8
    mean = sum(rewards) / 8
    assert sum((r - mean) ** 2 for r in rewards) > 0
    prompts = PromptFilter(replace(DYNAMIC, max_batches=1, size_factor=1.0), 1, 0)
    with pytest.raises(NotEnoughGroups):
        run_step(prompts, endless(), lambda p: rewards)
    assert 0.1 + 0.2 != 0.3  # nor is a difference of rounding a signal
    with pytest.raises(NotEnoughGroups):
        run_step(prompts, endless(), lambda p: [0.1 + 0.2, 0.3])


# ------------------------------------------------------------------------------------------------ after the rescue

LENS = RescueConfig(mode="purification")


@pytest.mark.parametrize(
    ("y", "again", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], True),  # the rescue gave a zero-reward group its signal
        ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], False),  # and here took it: perfect purification
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], False),
        ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], True),
    ],
)
@pytest.mark.parametrize("mode", ["dynamic", "greso", "greso_dynamic"])
def test_variance_is_judged_after_the_rescue(mode: str, y: list[float], again: list[float], kept: bool) -> None:
    prompts = PromptFilter(FilterConfig(mode=mode), 1, 0)
    prompts.begin_step(0, 0)
    prompts.next_batch_size()
    prompts.propose(["p"])
    assert bool(prompts.accept([rebuild_group(group(y, again), LENS, 0, 0)])) == kept


def test_streaks_count_original_rollouts() -> None:
    """x stays hard for the policy, however well x' went."""
    prompts = PromptFilter(FilterConfig(mode="greso"), 4, 0)
    groups, _ = run_step(prompts, around(6), lambda p: [0.0, 0.0], again=lambda p: [1.0, 0.0], rescue=LENS)
    assert all(one.rescued and one.has_signal for one in groups) and len(groups) == 4
    assert prompts.state_dict()["greso"]["streaks"] == {f"p{i}": -1 for i in range(6)}


@pytest.mark.parametrize("mode", ["dynamic", "greso", "greso_dynamic"])
@pytest.mark.parametrize(("baseline", "kept"), [("group", 0), ("leave_one_out", 0), ("original", 1)])
def test_the_run_keeps_what_its_own_baseline_learns_from(mode: str, baseline: str, kept: int) -> None:
    """An all-success rescue of a group of failures: nothing against its own mean, 1 for all against that of Y."""
    advantage = {"baseline": baseline, "std": "none", "weights": "none", "overlong": None}
    algorithm = load_algorithm({"preset": "lens_dapo", "advantage": advantage, "filter": {"mode": mode}})
    groups = [group([0.0] * 4, [1.0] * 4, "solved"), group([0.0] * 4, [0.0] * 4, "failed")]
    prompts = PromptFilter(algorithm.filter, 2, 0)
    prompts.begin_step(0, 0)
    prompts.next_batch_size()
    prompts.propose(["solved", "failed"])
    host = Host.__new__(Host)  # its part that rebuilds and filters, without data, engine and run folder
    host.config = replace(RunConfig("m", "r", DataConfig("d"), algorithm), guards=GuardConfig(engine_weights=False))
    host.prompt_filter, host.step, host._batch = prompts, 0, 0
    host._signals, host._groups, host._outcomes, host._counts = {}, [], [], []
    host._purify = lambda *args: []  # type: ignore[method-assign]
    host._take_in([], [], SampleResult(groups, SampleCounts()))
    assert prompts.metrics()["filter/dropped"] == 2 - kept
    teaches = [
        any(sample.advantage for sample in samples_of_group(one, algorithm.advantage, 99)) for one in host._groups
    ]
    assert [one.has_signal for one in host._groups] == teaches == [bool(kept), False]


# ----------------------------------------------------------------------------------------------------------- GRESO

GRESO = FilterConfig(mode="greso")


def test_greso_first_batch_then_by_need_and_short_if_need_be() -> None:
    """256 prompts: 384 first. A third kept, 128: missing 128 / (1/3) x 1.25 = 480, more than 384, so not the last.
    Of 384 again 128 are kept: full. With one in four kept: 96; missing 160 x 4 x 1.25 = 800; 192; 64 x 4 x 1.25 = 320,
    the last one; 80 of 320 kept: full."""
    _, sizes = run_step(PromptFilter(GRESO, 256, 0), endless(), mixed)
    assert sizes == [384, 384]
    quarter = PromptFilter(GRESO, 256, 0)
    groups, sizes = run_step(quarter, endless(), lambda p: [1.0, 0.0] if int(p[1:]) % 4 == 0 else [0.0, 0.0])
    assert sizes == [384, 384, 320]
    assert len(groups) == 256


def test_greso_trains_short_after_its_last_batch() -> None:
    """200 kept of 384; missing 56: 56 x 384/200 x 1.25 = 134, the last."""
    seen = iter(range(10**6))
    prompts = PromptFilter(GRESO, 256, 0)
    groups, sizes = run_step(prompts, endless(), lambda p: [1.0, 0.0] if next(seen) < 200 else [0.0, 0.0])
    assert sizes == [384, 134]
    assert len(groups) == 200
    assert prompts.metrics()["filter/missing"] == 56


def test_greso_with_dynamic_sampling_never_trains_short() -> None:
    seen = iter(range(10**6))
    prompts = PromptFilter(replace(GRESO, mode="greso_dynamic", size_factor=1.0), 16, 0)
    groups, sizes = run_step(prompts, endless(), lambda p: [1.0, 0.0] if next(seen) % 40 < 10 else [0.0, 0.0])
    assert len(groups) == 16 and set(sizes) == {16}


def test_greso_without_any_variance_ends_in_an_error_and_not_in_a_division() -> None:
    with pytest.raises(NotEnoughGroups):
        run_step(PromptFilter(GRESO, 8, 0), endless(), lambda p: [0.0, 0.0])


def test_skips_happen_at_the_published_probability() -> None:
    prompts = PromptFilter(replace(GRESO, greso=GresoConfig(target=1.0, p_step=0.0)), 400, 0)
    easy_or_mixed: Rewards = lambda p: [1.0, 1.0] if int(p[1:]) % 2 else [1.0, 0.0]  # noqa: E731
    run_step(prompts, around(1200), easy_or_mixed)
    seen = [p for p, streak in prompts.state_dict()["greso"]["streaks"].items() if streak == 1]
    assert len(seen) > 250
    prompts.begin_step(1, 1)
    prompts.next_batch_size()
    wanted = prompts.propose(seen)
    assert abs(sum(wanted) / len(seen) - 0.5) < 4 * (0.25 / len(seen)) ** 0.5
    assert prompts.metrics()["filter/skipped_easy"] == len(seen) - sum(wanted)
    assert prompts.metrics()["filter/skipped_hard"] == 0


def test_unseen_prompts_are_never_skipped() -> None:
    prompts = PromptFilter(GRESO, 100, 0)
    prompts.begin_step(7, 3)
    prompts.next_batch_size()
    assert prompts.propose([f"new{i}" for i in range(150)]) == [True] * 150


def test_a_data_set_of_streaks_is_drawn_again_until_chance_lets_it_pass() -> None:
    """Fresh chances each time round: a small hard data set cannot block the step."""
    prompts = PromptFilter(replace(GRESO, mode="greso_dynamic", size_factor=1.0), 4, 0)
    prompts.load_state_dict({"greso": {"p_easy": 0.5, "p_hard": 0.5, "streaks": {f"p{i}": -20 for i in range(4)}}})
    groups, _ = run_step(prompts, islice(around(4), 5000), lambda p: [1.0, 0.0], epoch=1)
    assert len(groups) == 4


def test_p_adapts_from_the_second_epoch_on_and_once_a_step() -> None:
    prompts = PromptFilter(GRESO, 8, 0)
    run_step(prompts, endless(), mixed, epoch=0)
    assert prompts.state_dict()["greso"]["p_easy"] == 0.5
    run_step(prompts, endless(), mixed, step=1, epoch=1)  # a third easy, a third hard: both over target
    assert (prompts.state_dict()["greso"]["p_easy"], prompts.state_dict()["greso"]["p_hard"]) == (0.49, 0.49)
    prompts.finish()
    assert prompts.state_dict()["greso"]["p_easy"] == 0.49


@pytest.mark.parametrize("mode", ["none", "dynamic", "greso", "greso_dynamic"])
def test_a_resumed_filter_goes_on_as_the_uninterrupted_one(mode: str) -> None:
    config = FilterConfig(mode=mode)
    ids, uninterrupted = around(40), PromptFilter(config, 6, 3)
    for step in range(4):
        run_step(uninterrupted, ids, mixed, step, epoch=1)
    resumed = PromptFilter(config, 6, 3)
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for step in range(4, 8):
        start = [f"p{(7 * step + i) % 40}" for i in range(2000)]
        one, _ = run_step(uninterrupted, iter(start), mixed, step, epoch=1)
        other, _ = run_step(resumed, iter(start), mixed, step, epoch=1)
        assert ids_of(one) == ids_of(other)
        assert uninterrupted.metrics() == resumed.metrics()
    assert uninterrupted.state_dict() == resumed.state_dict()


def test_a_checkpoint_of_another_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks GRESO"):
        PromptFilter(GRESO, 4, 0).load_state_dict({})
    with pytest.raises(ValueError, match="has GRESO"):
        PromptFilter(DYNAMIC, 4, 0).load_state_dict(PromptFilter(GRESO, 4, 0).state_dict())


@pytest.mark.parametrize(
    "tree", [{"size_factor": 0.5}, {"max_batches": 0}, {"mode": "dapo"}, {"greso": {"p_easy": 2}}, {"size": 3}]
)
def test_bad_configuration_is_one_clear_line(tree: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^run\.yaml: "):
        build(FilterConfig, tree, "run.yaml")
