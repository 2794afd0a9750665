"""Training with the experts that somebody else chose equals an HF model forced to the same experts, in every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import reference, replay_cases
from tests.tiny_models import hf_model, random_sequences

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "1": (1, ParallelConfig(), "none"),
    "1 full recompute": (1, ParallelConfig(), "full"),
    "tp2+sp selective": (2, ParallelConfig(tp=2), "selective"),
    "pp2 full recompute": (2, ParallelConfig(pp=2), "full"),
    "pp2 vpp2 full recompute": (2, ParallelConfig(pp=2, vpp=2), "full"),
    "cp2": (2, ParallelConfig(cp=2), "none"),
    "ep2": (2, ParallelConfig(ep=2), "none"),
    "tp2 pp2": (4, ParallelConfig(tp=2, pp=2), "none"),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS)
BUDGET = 64
SEQUENCES = random_sequences(11)
DATA = reference.loss_data(SEQUENCES)
LAYERS, EXPERTS, TOPK = 4, 8, 2


@functools.cache
def routing_of(seed: int) -> list[Tensor]:
    """The experts that the HF model with these weights takes: [tokens, layers, K] a sequence."""
    model = hf_model("qwen3_moe", seed=seed)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: seen.append(output[2]))
    result = []
    for sequence in SEQUENCES:
        seen.clear()
        with torch.no_grad():
            model(sequence[None])
        result.append(torch.stack(seen, dim=1))
    return result


@functools.cache
def another_engine() -> list[Tensor]:
    """Experts of a model with other weights, told as an engine does: without the last token, one prompt not at all."""
    routing = [experts[:-1].to(torch.int16) for experts in routing_of(5)]
    routing[2][: DATA.starts[2]] = -1
    return routing


def forced(folder: Path, sequence_number: list[int]) -> Any:
    """The HF model with `another_engine`'s experts for the sequence whose number stands in the list."""
    model = reference.load(folder)
    for place, layer in enumerate(model.model.layers):

        def forward(hidden: Tensor, gate: Any = layer.mlp.gate, place: int = place) -> tuple[Tensor, Tensor, Tensor]:
            logits = hidden.reshape(-1, hidden.size(-1)) @ gate.weight.t()
            experts = logits.topk(TOPK).indices
            given = another_engine()[sequence_number[0]][:, place].long()
            for token, chosen in enumerate(given.tolist()):
                if chosen[0] >= 0:
                    experts[token] = torch.tensor(chosen)
            return logits, logits.gather(1, experts).softmax(-1), experts

        layer.mlp.gate.forward = forward
    return model


@functools.cache
def expected(folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    number = [0]
    model = forced(folder, number)
    logprobs = []
    total: dict[str, Tensor] = {}
    for number[0], sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            logprobs.append(reference.scores(model, sequence)[0])

        start, old = DATA.starts[number[0]], DATA.old[number[0]]
        model.zero_grad()
        logp, entropy = reference.scores(model, sequence)
        loss = reference.token_loss(logp[start:], entropy[start:], old[start:], DATA.advantages[number[0]])
        (loss.sum() / DATA.responses).backward()
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad
    return logprobs, reference.per_expert(total)


def assert_gradients_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-7)) < 1e-4, name


@EACH
def test_recorded_experts_are_those_of_hf_and_change_nothing_when_replayed(
    layout: str, workers: Any, hf_folder: Any
) -> None:
    world, parallel, recompute = LAYOUTS[layout]
    folder = hf_folder("qwen3_moe")
    answers = workers(world).run(replay_cases.record, folder, parallel, SEQUENCES, BUDGET)
    for _, routing in answers:
        for found, hf in zip(routing, routing_of(0), strict=True):
            assert torch.equal(found.long().sort(-1).values, hf.sort(-1).values)
    logprobs, routing = answers[0]
    plain_logprobs, plain = workers(world).run(
        replay_cases.replay, folder, parallel, SEQUENCES, DATA, BUDGET, None, recompute
    )[0]
    again_logprobs, again = workers(world).run(
        replay_cases.replay, folder, parallel, SEQUENCES, DATA, BUDGET, routing, recompute
    )[0]
    for before, without, replayed in zip(logprobs, plain_logprobs, again_logprobs, strict=True):
        torch.testing.assert_close(before, without, atol=1e-6, rtol=0, equal_nan=True)
        torch.testing.assert_close(replayed, without, atol=1e-6, rtol=0, equal_nan=True)
    assert_gradients_equal(again, plain)


@EACH
def test_replaying_another_models_experts_equals_hf_forced_to_them(layout: str, workers: Any, hf_folder: Any) -> None:
    world, parallel, recompute = LAYOUTS[layout]
    folder = hf_folder("qwen3_moe")
    hf_logprobs, hf_gradients = expected(folder)
    logprobs, gradients = workers(world).run(
        replay_cases.replay, folder, parallel, SEQUENCES, DATA, BUDGET, another_engine(), recompute
    )[0]
    for found, wanted in zip(logprobs, hf_logprobs, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, equal_nan=True)
    assert_gradients_equal(gradients, hf_gradients)


def test_the_two_models_really_choose_differently(hf_folder: Any) -> None:
    """Otherwise the test above would pass without any replay."""
    hf_logprobs, _ = expected(hf_folder("qwen3_moe"))
    with torch.no_grad():
        model = reference.load(hf_folder("qwen3_moe"))
        own = [reference.scores(model, sequence)[0] for sequence in SEQUENCES]
    assert all(float((a - b)[1:].abs().max()) > 1e-2 for a, b in zip(hf_logprobs, own, strict=True))


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (lambda routing: routing[:-1], "10 sequences was given for 11"),
        (lambda routing: [routing[0][:, :3], *routing[1:]], "sequence 0 has routing of shape"),
        (lambda routing: [routing[0].repeat(3, 1, 1), *routing[1:]], "sequence 0 has routing of shape"),
        (lambda routing: [routing[0][:, :, :1].expand(-1, -1, 2), *routing[1:]], "choice of different experts below 8"),
        (lambda routing: [*routing[:-1], routing[-1] + EXPERTS], "choice of different experts below 8"),
        (lambda routing: [*routing[:-1], routing[-1] - EXPERTS], "choice of different experts below 8"),
        (lambda routing: routing, "accepted"),
    ],
)
def test_routing_that_cannot_be_this_models_is_refused(planted: Any, words: str, workers: Any, hf_folder: Any) -> None:
    folder = hf_folder("qwen3_moe")
    answer = workers(1).run(replay_cases.refused, folder, SEQUENCES, BUDGET, planted(routing_of(0)))[0]
    assert words in answer


def test_a_rollout_moved_to_another_prompt_keeps_its_responses_experts() -> None:
    from lens_megatron.mcore.routing import OWN_CHOICE, after_another_prompt

    routing = torch.randint(0, EXPERTS, (9, LAYERS, TOPK), dtype=torch.uint8)  # 4 of the prompt, 5 of the response
    moved = after_another_prompt(routing, rolled_prompt=4, prompt=6)
    assert moved.shape == (11, LAYERS, TOPK)
    assert bool((moved[:6] == OWN_CHOICE).all())
    assert torch.equal(moved[6:].long(), routing[4:].long())
