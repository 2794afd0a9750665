"""What every engine must do, whatever is behind it: run against the embedded engine (tests/rollout/test_engines.py) and
against real SGLang servers (tests/sglang/test_engines.py).

An engine comes with weights of version 0, those of `net`, and with `weights(version, seed)`, which gives it tiny.model(seed).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lens_megatron.errors import UsageError
from lens_megatron.rollout.engine import Engine, Finished, Request
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import NO_RESCUE, SamplingConfig
from lens_megatron.types import Prompt, Rollout

from . import tiny

PATIENCE_S = 60.0


@dataclass
class Case:
    engine: Engine
    weights: Callable[[int, int], None]
    limit: int  # prompt and response together


def drain(engine: Engine, count: int) -> dict[str, Finished]:
    done: dict[str, Finished] = {}
    deadline = time.monotonic() + PATIENCE_S
    while len(done) < count:
        assert time.monotonic() < deadline, f"{len(done)} of {count} after {PATIENCE_S:.0f} s: {engine.health()}"
        for finished in engine.poll(1.0):
            assert finished.id not in done, f"{finished.id} came twice"
            done[finished.id] = finished
    assert engine.poll(0.05) == []
    return done


@torch.no_grad()
def scored(net: Any, request: Request, finished: Finished) -> torch.Tensor:
    """Log-probs of the response by the HF model, without cache or batch."""
    tokens = [*request.prompt, *finished.tokens]
    scores = (net(torch.tensor([tokens])).logits[0].double() / (request.temperature or 1.0)).log_softmax(-1)
    places = torch.arange(len(request.prompt) - 1, len(tokens) - 1)
    return scores[places, torch.tensor(finished.tokens, dtype=torch.long)]


def check_response(net: Any, request: Request, finished: Finished) -> None:
    assert len(finished.tokens) == len(finished.logprobs) <= request.max_tokens
    assert all(0 <= token < tiny.VOCAB for token in finished.tokens)
    assert not set(finished.tokens[:-1]) & set(request.stop), "it went on after a stop token"
    if finished.finish == "stop":
        assert finished.tokens[-1] in request.stop
    elif finished.finish == "length":
        assert len(finished.tokens) == request.max_tokens
    torch.testing.assert_close(
        torch.tensor(finished.logprobs, dtype=torch.double), scored(net, request, finished), atol=1e-4, rtol=0
    )


def requests(count: int, max_tokens: int = 24, **changes: Any) -> list[Request]:
    generator = torch.Generator().manual_seed(count)
    made = []
    for i in range(count):
        length = int(torch.randint(1, 20, (), generator=generator))
        prompt = tuple(torch.randint(4, tiny.VOCAB, (length,), generator=generator).tolist())
        values = {"stop": (tiny.STOP, 7), "seed": 1000 + i, **changes}
        made.append(Request(f"case/{i}", prompt, max_tokens, **values))
    return made


class EngineCases:
    """Subclasses give the fixture `case`, with weights of version 0 at the start of each test."""

    @pytest.fixture(scope="class")
    def net(self) -> Any:
        return tiny.model(0, tied=False)

    @pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (0.0, 1.0)])
    def test_responses_and_logprobs_are_the_models(
        self, case: Case, net: Any, temperature: float, top_p: float
    ) -> None:
        wanted = requests(24, temperature=temperature, top_p=top_p)
        case.engine.submit(wanted)
        done = drain(case.engine, len(wanted))
        for request in wanted:
            check_response(net, request, done[request.id])
            assert [(span.version, span.start) for span in done[request.id].versions] == [(0, 0)]
        if temperature > 0:
            assert {finished.finish for finished in done.values()} == {"stop", "length"}
        else:  # the likeliest tokens, whatever the seed
            again = [Request(f"again/{r.id}", r.prompt, r.max_tokens, r.stop, 0.0, seed=7) for r in wanted]
            case.engine.submit(again)
            repeated = drain(case.engine, len(again))
            assert [repeated[f"again/{r.id}"].tokens for r in wanted] == [done[r.id].tokens for r in wanted]

    def test_rollouts_of_one_prompt_differ(self, case: Case) -> None:
        case.engine.submit([Request(f"same/{i}", (5, 9, 30), 16, seed=i) for i in range(12)])
        assert len({finished.tokens for finished in drain(case.engine, 12).values()}) > 8

    def test_sampling_follows_the_models_distribution(self, case: Case, net: Any) -> None:
        """One token of one prompt, many times: chi-squared over the vocabulary."""
        count, prompt = 600, (5, 9, 30)
        case.engine.submit([Request(f"chi/{i}", prompt, 1, seed=i) for i in range(count)])
        tokens = torch.tensor([finished.tokens[0] for finished in drain(case.engine, count).values()])
        with torch.no_grad():
            expected = torch.softmax(net(torch.tensor([prompt])).logits[0, -1].double(), -1) * count
        seen = torch.bincount(tokens, minlength=tiny.VOCAB).double()
        common = expected >= 5  # the rest together, as the test wants
        observed = torch.cat([seen[common], seen[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]])
        assert float(((observed - wanted) ** 2 / wanted).sum()) < 90, "far beyond any chance"

    def test_more_than_the_slots_all_come_back_once(self, case: Case, net: Any) -> None:
        wanted = requests(80, max_tokens=12)
        free = case.engine.free_slots()
        assert 0 < free < 80
        case.engine.submit(wanted)
        assert case.engine.free_slots() == 0
        done = drain(case.engine, 80)
        assert set(done) == {request.id for request in wanted}
        assert case.engine.free_slots() > 0
        for request in wanted[::10]:
            check_response(net, request, done[request.id])

    def test_an_aborted_rollout_comes_back_with_its_part(self, case: Case, net: Any) -> None:
        long = case.limit - 20
        running = [Request(f"long/{i}", (5 + i, 6, 7), 200 if i == 1 else long, seed=i) for i in range(3)]
        case.engine.submit(running)
        case.engine.poll(0.2)
        case.engine.abort(["long/0", "long/2", "unknown"])
        done = drain(case.engine, 3)
        for i, request in enumerate(running):
            assert done[request.id].finish == ("abort" if i != 1 else "length")
            if done[request.id].tokens:
                torch.testing.assert_close(
                    torch.tensor(done[request.id].logprobs, dtype=torch.double),
                    scored(net, request, done[request.id]),
                    atol=1e-4,
                    rtol=0,
                )
        assert len(done["long/0"].tokens) < long

    def test_aborting_before_it_runs_gives_an_empty_part(self, case: Case) -> None:
        """Whether those that began had a token by then is chance; the last one in stood behind many times the slots."""
        waiting = requests(80, max_tokens=case.limit - 30, stop=())
        assert case.engine.free_slots() < 80
        case.engine.submit(waiting)
        case.engine.abort([request.id for request in waiting])
        done = drain(case.engine, len(waiting))
        assert {finished.finish for finished in done.values()} == {"abort"}
        assert all(len(finished.tokens) < case.limit - 30 for finished in done.values())
        assert done[waiting[-1].id].tokens == ()

    def test_a_request_that_cannot_fit_is_refused_and_nothing_else(self, case: Case) -> None:
        with pytest.raises(UsageError, match="exceeds"):
            case.engine.submit([Request("too long", (5,) * 10, case.limit)])
        fits = Request("fits", (5,) * 10, 4)
        case.engine.submit([fits])
        assert len(drain(case.engine, 1)["fits"].tokens) <= 4

    def test_new_weights_are_used_at_once_and_named(self, case: Case) -> None:
        wanted = requests(8)
        for version, seed in ((7, 1), (8, 0)):
            case.weights(version, seed)
            assert case.engine.version == version
            case.engine.submit([Request(f"{version}/{r.id}", r.prompt, r.max_tokens, r.stop) for r in wanted])
            done = drain(case.engine, len(wanted))
            for request in wanted:
                finished = done[f"{version}/{request.id}"]
                check_response(tiny.model(seed, tied=False), request, finished)
                assert {span.version for span in finished.versions} == {version}

    def test_during_an_update_nothing_is_sampled(self, case: Case) -> None:
        case.engine.begin_update(5)
        assert case.engine.version == -1
        case.weights(5, 0)
        assert case.engine.version == 5

    def test_a_batch_of_the_sampler_is_whole(self, case: Case, net: Any) -> None:
        def reward(prompt: Prompt, rollout: Rollout) -> float:
            return float(sum(rollout.response) % 2)

        config = SamplingConfig(n=4, max_response_tokens=12, stall_seconds=60.0)
        sampler = Sampler(case.engine, reward, NO_RESCUE, config, (tiny.STOP,), seed=0)
        prompts = [Prompt(str(i), (5 + i, 6, 7), (0, 3), "") for i in range(6)]
        result = sampler.sample(prompts, [None] * 6, step=0)
        assert [len(group.originals) for group in result.groups] == [4] * 6
        for group in result.groups:
            for rollout in group.originals:
                assert rollout.weight_version == case.engine.version
                response = Finished("", rollout.response, rollout.behaviour_logprobs, rollout.finish)
                check_response(net, Request("", rollout.roll_tokens, 12, (tiny.STOP,)), response)
