"""Rollouts that an engine aborts, or that give way, keep what they have: long responses are not drawn until they are short."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from lens_megatron.rollout.engine import Finished, Request, VersionSpan
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import NO_RESCUE, RescueRules, SampleResult, SamplingConfig
from lens_megatron.routed_experts import Routing
from lens_megatron.types import Prompt, Rollout

from .scripted import ScriptedEngine, prompts

STOP, ENDS, LONGEST, UPDATE_AT = 0, 0.1, 200, 8


class DrawingEngine(ScriptedEngine):
    """One token a poll for each that runs, ended by chance whatever the seed. A token is its place in the sequence, its
    log-prob the version of the weights. `UPDATE_AT` polls in, new weights come and abort what runs."""

    deterministic = False

    def __init__(self, slots: int, seed: int, updates: bool, ends: float = ENDS) -> None:
        super().__init__(slots, seed)
        self.updates, self.ends = updates, ends
        self.drawn: dict[str, list[int]] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.drawn.update({request.id: [] for request in requests})

    def poll(self, timeout: float) -> list[Finished]:
        self.time += 1.0
        done, self.aborted = self.aborted, []
        if self.updates and self.time == UPDATE_AT:
            self.abort(list(self.running))
            self.version += 1
            return done
        for request in list(self.running.values()):
            tokens = self.drawn[request.id]
            ends = self.rng.random() < self.ends
            tokens.append(STOP if ends else len(request.prompt) + len(tokens))
            if ends or len(tokens) == request.max_tokens:
                done.append(self._out(request.id, "stop" if ends else "length"))
        return done

    def abort(self, ids: Iterable[str]) -> None:
        self.aborted += [self._out(request_id, "abort") for request_id in ids if request_id in self.running]

    def _out(self, request_id: str, finish: str) -> Finished:
        request, tokens = self.running.pop(request_id), tuple(self.drawn[request_id])
        self.log.append((finish, request))
        logprobs = (-1.0 - self.version,) * len(tokens)
        return Finished(request.id, tokens, logprobs, finish, (VersionSpan(self.version, 0, len(tokens)),))  # type: ignore[arg-type]


def result_of(
    engine: DrawingEngine,
    count: int,
    rules: RescueRules = NO_RESCUE,
    success: float = 1.0,
    routing_replay: bool = False,
) -> SampleResult:
    rng = random.Random(7)
    config = SamplingConfig(
        n=4,
        max_response_tokens=LONGEST,
        schedule="speculative",
        speculate_from=0.0,
        routing_replay=routing_replay,
    )

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        return float(rng.random() < success)

    return Sampler(engine, reward, rules, config, (STOP,), seed=5).sample(*prompts(count), 1)


def is_whole(rollout: Rollout) -> bool:
    body = rollout.response[:-1] if rollout.finish == "stop" else rollout.response
    first = len(rollout.roll_tokens)
    return body == tuple(range(first, first + len(body))) and len(rollout.behaviour_logprobs) == len(rollout.response)


def test_new_weights_leave_the_lengths_as_they_are() -> None:
    lengths = {}
    for updates in (False, True):
        engine = DrawingEngine(10**6, 3, updates)
        rollouts = [r for group in result_of(engine, 500).groups for r in group.originals]
        assert all(is_whole(rollout) for rollout in rollouts)
        lengths[updates] = sum(len(r.response) for r in rollouts) / len(rollouts)
    # 2000 draws of mean 10 and deviation 9.5: a standard error of 0.2. Drawn anew the mean would be below 6
    assert lengths[False] == pytest.approx(1 / ENDS, abs=0.8)
    assert lengths[True] == pytest.approx(1 / ENDS, abs=0.8)


def test_each_part_keeps_the_log_probs_and_the_version_of_its_weights() -> None:
    result = result_of(DrawingEngine(10**6, 3, True), 100)
    rollouts = [r for group in result.groups for r in group.originals]
    across = [r for r in rollouts if len(r.response) >= UPDATE_AT]
    assert 100 < len(across) == result.counts.resubmitted_rollouts < 400
    before = UPDATE_AT - 1
    for rollout in across:
        new = len(rollout.response) - before
        assert rollout.behaviour_logprobs == (-1.0,) * before + (-2.0,) * new
        assert rollout.weight_version == 0
    assert result.counts.wasted_tokens == 0


@pytest.mark.parametrize("asked", [True, False])
def test_experts_are_asked_for_and_are_those_of_the_last_pass(asked: bool) -> None:
    """Which read prompt and first part once more: a row for each of their tokens, and for the second part's."""

    class Telling(DrawingEngine):
        def _out(self, request_id: str, finish: str) -> Finished:
            request, response = self.running[request_id], super()._out(request_id, finish)
            assert request.routing is asked
            rows = len(request.prompt) + len(response.tokens) - 1
            told = Routing.of(np.full((rows, 2), self.version)) if asked and finish != "abort" else None
            return replace(response, routing=told)

    result = result_of(Telling(10**6, 3, True), 50, routing_replay=asked)
    rollouts = [r for group in result.groups for r in group.originals]
    assert any(len(r.response) >= UPDATE_AT for r in rollouts)
    for rollout in rollouts:
        assert (rollout.routing is not None) == asked
        if rollout.routing is not None:
            rows = len(rollout.roll_tokens) + len(rollout.response) - 1
            version = int(len(rollout.response) >= UPDATE_AT)
            assert rollout.routing.experts().tolist() == [[version, version]] * rows


@pytest.mark.parametrize("told", [True, False])
def test_what_was_complete_when_it_was_aborted_is_drawn_again_where_its_experts_are_unknown(told: bool) -> None:
    class Late(DrawingEngine):
        """Aborts each of its first four responses after the last token."""

        late = 4

        def _out(self, request_id: str, finish: str) -> Finished:
            request, response = self.running[request_id], super()._out(request_id, finish)
            rows = len(request.prompt) + len(response.tokens) - 1
            response = replace(response, routing=Routing.of(np.zeros((rows, 2), int)))
            if finish == "stop" and self.late:
                self.late -= 1
                response = replace(response, finish="abort", routing=response.routing if told else None)
            return response

    engine = Late(10**6, 3, False)
    rollouts = [r for group in result_of(engine, 5, routing_replay=True).groups for r in group.originals]
    assert all(is_whole(r) and r.finish == "stop" and r.routing is not None for r in rollouts)
    assert len(engine.log) == 2 * (20 + (0 if told else 4))  # submitted and come back


def test_speculation_that_gave_way_goes_on() -> None:
    rules = RescueRules(
        certain=lambda rewards, n: (sum(rewards) + n - len(rewards)) / n < 0.5,
        moot=lambda rewards, n: sum(rewards) / n >= 0.5,
    )
    engine = DrawingEngine(60, 3, False, 0.01)  # full of speculation when rescues become certain
    result = result_of(engine, 30, rules, success=0.2)
    rescues = [r for group in result.groups for r in group.purified]
    assert all(is_whole(r) for group in result.groups for r in (*group.originals, *group.purified))
    assert len(rescues) == result.counts.purified_rollouts > 30
    went_on = [request for event, request in engine.log if event == "submit" and request.max_tokens < LONGEST]
    assert any(len(engine.drawn[request.id]) > 0 for request in went_on)
    assert {len(request.prompt) + request.max_tokens for request in went_on} == {3 + LONGEST}


def test_parts_are_joined_with_their_versions() -> None:
    begun = Finished("a", (1, 2), (-0.1, -0.2), "abort", (VersionSpan(3, 0, 2),))
    rest = Finished("b", (4,), (-0.3,), "stop", (VersionSpan(4, 0, 1),))
    whole = begun.followed_by(rest)
    assert whole == Finished("b", (1, 2, 4), (-0.1, -0.2, -0.3), "stop", (VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)))
    assert whole.oldest_version == 3
