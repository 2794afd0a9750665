"""The three schedules give the groups that a plain loop gives, whatever finishes first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lens_megatron.errors import RunError
from lens_megatron.rollout.embedded import EmbeddedEngine
from lens_megatron.rollout.engine import Request, derive_seed
from lens_megatron.rollout.history import SuccessHistory, chance_below
from lens_megatron.rollout.sampler import Sampler, SamplingAborted
from lens_megatron.rollout.sampling import NO_RESCUE, RescueRules, SamplingConfig
from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout

from . import tiny
from .scripted import ScriptedEngine, prompts, response_of, reward_of

SCHEDULES = ("after_group", "early", "speculative")


def rules(tau: float) -> RescueRules:
    return RescueRules(
        certain=lambda rewards, n: (sum(rewards) + n - len(rewards)) / n < tau,
        moot=lambda rewards, n: sum(rewards) / n >= tau,
    )


def sampler(engine: Any, reward: Any = reward_of, tau: float = 0.5, **changes: Any) -> Sampler:
    config = SamplingConfig(**{"n": 4, "max_response_tokens": 12, "speculate_from": 0.0, **changes})
    return Sampler(engine, reward, rules(tau), config, (0,), seed=5)


def plain_groups(xs: Sequence[Prompt], x_s: Sequence[PurifiedPrompt | None], step: int, tau: float) -> list[Group]:
    """The paper's order, one rollout after the other."""
    groups = []
    for g, (x, x_) in enumerate(zip(xs, x_s, strict=True)):

        def rollouts(tokens: tuple[int, ...], purified: bool, g: int = g, x: Prompt = x) -> tuple[Rollout, ...]:
            made = []
            for i in range(4):
                done = response_of(Request("any", tokens, 12, seed=derive_seed(5, step, g, x.id, i, purified)))
                rollout = Rollout(x.id, tokens, done.tokens, done.logprobs, done.finish, i, purified)
                made.append(replace(rollout, reward=reward_of(x, rollout)))
            return tuple(made)

        originals = rollouts(x.tokens, False)
        if x_ is not None and sum(r.reward for r in originals) / 4 < tau:
            groups.append(Group(x, originals, x_, rollouts(x_.tokens, True)))
        else:
            groups.append(Group(x, originals))
    return groups


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 60),
    st.integers(0, 10**6),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 0.9]),
)
@example("speculative", 41, 41, 1.0, 0.3)
def test_every_schedule_gives_the_plain_groups(
    schedule: str, slots: int, order: int, tau: float, speculate_from: float
) -> None:
    xs, x_s = prompts(11)
    engine = ScriptedEngine(slots, order)
    sampling = sampler(engine, tau=tau, schedule=schedule, speculate_from=speculate_from)
    for step in (1, 2):  # the second with a history
        result = sampling.sample(xs, x_s, step)
        assert result.groups == plain_groups(xs, x_s, step, tau)
        assert not engine.running, "the engine is left idle"
    rescued = sum(len(group.purified) for group in result.groups)
    assert result.counts.purified_rollouts == rescued
    assert result.counts.original_rollouts == 44
    assert 0 < rescued < 44
    if schedule != "speculative":
        assert result.counts.wasted_rollouts == result.counts.speculated_rollouts == 0
    if schedule == "after_group":
        assert result.counts.saved_rollouts == 0


def started(engine: ScriptedEngine) -> list[tuple[str, int]]:
    return [(event, request.priority) for event, request in engine.log if event != "abort"]


def test_after_group_starts_a_rescue_only_when_all_of_its_group_is_done() -> None:
    xs, x_s = prompts(6)
    engine = ScriptedEngine(100, 3)
    sampler(engine, schedule="after_group").sample(xs, x_s, 1)
    finished: dict[str, int] = dict.fromkeys("012345", 0)
    for event, request in engine.log:
        _, g, which, _ = request.id.split("/")
        if event == "finish" and which[0] == "x":
            finished[g] += 1
        if event == "submit" and which[0] == "p":
            assert finished[g] == 4


def test_early_starts_a_rescue_while_its_group_still_runs() -> None:
    xs, x_s = prompts(30)
    engine = ScriptedEngine(200, 3)
    result = sampler(engine, schedule="early").sample(xs, x_s, 1)
    running: dict[str, set[str]] = {}
    overlap = 0
    for event, request in engine.log:
        _, g, which, _ = request.id.split("/")
        if event == "submit" and which[0] == "p":
            overlap += bool(running.get(g))
        if which[0] == "x":
            (set.add if event == "submit" else set.discard)(running.setdefault(g, set()), which)
    assert overlap > 0 and result.counts.saved_rollouts > 0


def test_originals_enter_before_any_rescue_and_certain_rescues_before_speculation() -> None:
    xs, x_s = prompts(20)
    engine = ScriptedEngine(10, 2)  # an order in which all of it happens
    result = sampler(engine, schedule="speculative").sample(xs, x_s, 1)
    last_original = max(i for i, (event, p) in enumerate(started(engine)) if (event, p) == ("submit", 0))
    first_speculation = min(i for i, (event, p) in enumerate(started(engine)) if (event, p) == ("submit", 2))
    assert last_original < first_speculation
    assert any(p == 1 for _, p in started(engine)[:first_speculation]), "rescues that are certain go first"
    assert result.counts.speculated_rollouts > 0
    assert result.counts.wasted_rollouts > 0
    assert any(event == "abort" for event, _ in engine.log), "moot rescues are cancelled"


def test_speculation_gives_way_to_certain_rescues() -> None:
    """Two slots are left for speculation on prompt 0; then prompt 1's rescue becomes certain."""
    xs, x_s = prompts(2)
    engine = ScriptedEngine(10, 0)

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        return 0.0 if prompt.id == "p1" else 1.0

    order = iter(["1/x0", "1/x1", "1/x2", "1/x3"])

    def poll(timeout: float) -> list[Any]:
        if (wanted := next(order, None)) is None:
            return original_poll(timeout)
        done, engine.aborted = engine.aborted, []
        key = next(k for k in engine.running if f"/{wanted}/" in f"{k}/")
        return [*done, response_of(engine.running.pop(key))]

    original_poll, engine.poll = engine.poll, poll  # type: ignore[method-assign]
    result = sampler(engine, reward, schedule="speculative").sample(xs, x_s, 1)
    evicted = [request.id.split("/")[1] for event, request in engine.log if event == "abort"]
    assert evicted and set(evicted) == {"0"}
    assert [len(group.purified) for group in result.groups] == [0, 4]


def test_speculation_prefers_prompts_that_failed_before() -> None:
    xs, x_s = prompts(4)

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        return float(prompt.id != "p2")

    engine = ScriptedEngine(18, 0)
    sampling = sampler(engine, reward, schedule="speculative")
    sampling.sample(xs, x_s, 1)
    resumed = sampler(engine, reward, schedule="speculative")
    resumed.load_state_dict(sampling.state_dict())
    engine.log.clear()
    resumed.sample(xs, x_s, 2)
    speculated = [request.id.split("/")[1] for event, request in engine.log if event == "submit" and request.priority]
    assert speculated[:2] == ["2", "2"], "two slots are free at the start"


def test_rewards_may_be_futures_and_slow_ones_change_nothing() -> None:
    xs, x_s = prompts(8)
    with ThreadPoolExecutor(4) as pool:

        def reward(prompt: Prompt, rollout: Rollout) -> Future[float]:
            def work() -> float:
                time.sleep(0.002 * (rollout.index + 1))
                return reward_of(prompt, rollout)

            return pool.submit(work)

        engines = [ScriptedEngine(40, 7) for _ in range(2)]
        engines[1].deterministic = False
        results = [sampler(engine, reward).sample(xs, x_s, 1) for engine in engines]
    assert [result.groups for result in results] == [plain_groups(xs, x_s, 1, 0.5)] * 2
    again = ScriptedEngine(40, 7)
    sampler(again, reward_of).sample(xs, x_s, 1)
    assert [request.id for _, request in engines[0].log] == [request.id for _, request in again.log], (
        "with a deterministic engine what is submitted does not depend on the rewards' speed"
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(0, 10**6))
def test_rollouts_the_engine_aborted_are_done_again(schedule: str, order: int) -> None:
    xs, x_s = prompts(6)
    result = sampler(ScriptedEngine(20, order, abort_chance=0.02), schedule=schedule).sample(xs, x_s, 1)
    assert result.groups == plain_groups(xs, x_s, 1, 0.5)


def test_an_engine_that_always_aborts_is_given_up() -> None:
    with pytest.raises(RunError, match="aborted a rollout 4 times"):
        sampler(ScriptedEngine(20, 0, abort_chance=1.0)).sample(*prompts(3), 1)


def test_a_stalled_engine_is_one_clear_error() -> None:
    engine = ScriptedEngine(20, 0)
    engine.hung = True
    with pytest.raises(RunError, match="nothing for 30 s with 12 rollouts in flight"):
        sampler(engine, stall_seconds=30.0, schedule="after_group").sample(*prompts(3), 1)
    assert not engine.running


def test_stop_aborts_what_is_in_flight() -> None:
    engine = ScriptedEngine(20, 0)

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        sampling.stop()
        return 0.0

    sampling = sampler(engine, reward)
    with pytest.raises(SamplingAborted):
        sampling.sample(*prompts(3), 1)
    assert not engine.running
    sampling.reward = reward_of
    assert sampling.sample(*prompts(3), 1).groups == plain_groups(*prompts(3), 1, 0.5)


def test_counts_add_up() -> None:
    xs, x_s = prompts(20)
    engine = ScriptedEngine(90, 2)
    result = sampler(engine).sample(xs, x_s, 1)
    counts = result.counts
    submitted = sum(event == "submit" for event, _ in engine.log)
    assert submitted == counts.original_rollouts + counts.purified_rollouts + counts.wasted_rollouts
    finished = [response_of(request) for event, request in engine.log if event == "finish"]
    aborted = [request for event, request in engine.log if event == "abort"]
    assert sum(len(f.tokens) for f in finished) + len(aborted) == (
        counts.original_tokens + counts.purified_tokens + counts.wasted_tokens
    )
    speculative = [request for event, request in engine.log if event == "submit" and request.priority == 2]
    assert counts.speculated_rollouts == len(speculative)
    assert 0 < counts.saved_rollouts <= counts.purified_rollouts
    assert 0 < counts.originals_seconds <= counts.seconds


@pytest.mark.parametrize("slots", [7, 64])
def test_the_embedded_engine_gives_equal_groups_under_every_schedule(slots: int) -> None:
    xs, x_s = prompts(10)

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        return float(sum(rollout.response) % 10 < int(prompt.id[1:]))

    results = []
    for schedule in SCHEDULES:
        engine = EmbeddedEngine(tiny.model(), slots=slots)
        results.append(sampler(engine, reward, schedule=schedule).sample(xs, x_s, 3))
    shapes = [
        [[(r.response, r.reward, r.index, r.purified, r.finish) for r in (*g.originals, *g.purified)] for g in r.groups]
        for r in results
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert 0 < results[0].counts.purified_rollouts < 40
    behaviour = [
        [x for g in r.groups for y in (*g.originals, *g.purified) for x in y.behaviour_logprobs] for r in results
    ]
    for a, b in itertools.pairwise(behaviour):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def test_without_rescue_there_are_originals_only() -> None:
    xs, x_s = prompts(5)
    engine = ScriptedEngine(100, 0)
    sampling = Sampler(engine, reward_of, NO_RESCUE, SamplingConfig(n=4, max_response_tokens=12), (0,), 5)
    assert sampling.sample(xs, x_s, 1).groups == [Group(g.prompt, g.originals) for g in plain_groups(xs, x_s, 1, 0.5)]
    assert sum(event == "submit" for event, _ in engine.log) == 20


def test_the_chance_of_a_rescue_is_the_beta_binomial_tail() -> None:
    for needed, trials, alpha, beta in [(4, 8, 1.0, 1.0), (2, 5, 0.7, 3.2), (0, 3, 1.0, 1.0), (4, 3, 1.0, 1.0)]:
        grid = [(i + 0.5) / 20000 for i in range(20000)]
        weights = [p ** (alpha - 1) * (1 - p) ** (beta - 1) for p in grid]
        tail = [_binomial_below(needed, trials, p) for p in grid]
        expected = sum(w * t for w, t in zip(weights, tail, strict=True)) / sum(weights)
        assert chance_below(needed, trials, alpha, beta) == pytest.approx(expected, abs=2e-3)


def _binomial_below(needed: int, trials: int, p: float) -> float:
    outcomes = itertools.product((0, 1), repeat=trials)
    return sum(p ** sum(o) * (1 - p) ** (trials - sum(o)) for o in outcomes if sum(o) < needed)


def test_history_leans_on_the_prompt_then_on_all_prompts() -> None:
    history = SuccessHistory()
    history.record([("hard", [0.0] * 8), ("easy", [1.0] * 8), ("easy too", [1.0] * 8)])
    mean = {key: (lambda ab: ab[0] / sum(ab))(history.belief(key, [])) for key in ("hard", "new", "easy")}
    assert mean["hard"] < 0.2 < 0.5 < mean["new"] < 0.9 < mean["easy"]
    a, b = history.belief("hard", [1.0, 1.0])
    assert a / (a + b) > mean["hard"]
