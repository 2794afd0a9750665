"""The simulated engine: its clock against a naive token-by-token simulation, and the schedules upon it."""

from __future__ import annotations

import random

import pytest

from benchmarks._simulated_engine import SimulatedEngine, Simulation, SimulationConfig
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import NO_RESCUE, RescueRules, SampleResult, SamplingConfig
from lens_megatron.types import PurifiedPrompt

RULES = RescueRules(
    certain=lambda rewards, n: (sum(rewards) + n - len(rewards)) / n < 0.5,
    moot=lambda rewards, n: sum(rewards) / n >= 0.5,
)


def test_finish_times_equal_a_naive_simulation() -> None:
    config = SimulationConfig(servers=1, slots_per_server=50, token_seconds=0.5, saturation_rows=10)
    simulation = Simulation(config, original_length=4)
    rng = random.Random(1)
    requests = [Request(str(i), (i, 1, 2, 3), 60, seed=rng.randrange(99)) for i in range(20)]
    engine = SimulatedEngine(simulation)
    engine.submit(requests)
    times: dict[str, float] = {}
    while done := engine.poll(1.0):
        times |= {finished.id: engine.clock() for finished in done}
        assert all(len(f.tokens) == simulation.response(requests[int(f.id)])[1] for f in done)
    left = {r.id: simulation.response(r)[1] for r in requests}
    now, expected = 0.0, {}
    while left:
        now += 0.5 * (1 + len(left) / 10)
        left = {i: tokens - 1 for i, tokens in left.items()}
        expected |= {i: now for i, tokens in left.items() if tokens == 0}
        left = {i: tokens for i, tokens in left.items() if tokens > 0}
    assert times == pytest.approx(expected)


def test_an_abort_gives_what_was_sampled_and_speeds_up_the_rest() -> None:
    simulation = Simulation(SimulationConfig(servers=1, token_seconds=1.0, saturation_rows=1.0), original_length=2)
    lengths = {i: simulation.response(Request(str(i), (i, 1), 4096, seed=i))[1] for i in range(3)}
    engine = SimulatedEngine(simulation)
    engine.submit([Request(str(i), (i, 1), 4096, seed=i) for i in range(3)])
    (first,) = engine.poll(1.0)
    others = sorted(set(range(3)) - {int(first.id)}, key=lambda i: lengths[i])
    assert engine.clock() == pytest.approx(4.0 * len(first.tokens))
    engine.abort([str(others[1])])
    (aborted,) = engine.poll(1.0)
    assert aborted.finish == "abort" and len(aborted.tokens) == len(first.tokens)
    engine.poll(1.0)
    assert engine.clock() == pytest.approx(4.0 * len(first.tokens) + 2.0 * (lengths[others[0]] - len(first.tokens)))


def sample(schedule: str, rules: RescueRules = RULES) -> SampleResult:
    simulation = Simulation(SimulationConfig(servers=4, slots_per_server=128), original_length=8)
    prompts, tokens = simulation.prompts(48)
    purified = [PurifiedPrompt(p.id, t, (7,)) for p, t in zip(prompts, tokens, strict=True)]
    config = SamplingConfig(schedule=schedule)  # type: ignore[arg-type]
    return Sampler(SimulatedEngine(simulation), simulation.reward, rules, config, (), 0).sample(prompts, purified, 1)


def test_schedules_give_equal_groups_and_the_later_ones_are_faster() -> None:
    results = {schedule: sample(schedule) for schedule in ("after_group", "early", "speculative")}
    assert results["after_group"].groups == results["early"].groups == results["speculative"].groups
    plain = sample("after_group", NO_RESCUE)
    assert [group.originals for group in plain.groups] == [group.originals for group in results["early"].groups]
    seconds = [results[schedule].counts.seconds for schedule in ("after_group", "early", "speculative")]
    assert seconds[0] > seconds[1] > seconds[2] > plain.counts.seconds
    assert results["speculative"].counts.saved_tokens > results["early"].counts.saved_tokens > 0


def test_success_follows_the_stated_rates() -> None:
    simulation = Simulation(SimulationConfig(), original_length=3)
    for prompt in ((1, 5, 6), (2, 5, 6), (2, 5)):
        outcomes = [simulation.response(Request("a", prompt, 4096, seed=seed))[0] for seed in range(3000)]
        assert sum(outcomes) / 3000 == pytest.approx(simulation.success_rate(prompt), abs=0.04)
    assert simulation.success_rate((2, 5)) == pytest.approx(min(0.95, simulation.success_rate((2, 5, 6)) + 0.2))
