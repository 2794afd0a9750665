"""Training with the experts that somebody else chose equals an HF model forced to the same experts, in every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.routed_experts import Routing
from lens_megatron.types import Sample
from tests.distributed import reference, replay_cases
from tests.tiny_models import hf_config, hf_model, random_sequences

LAYOUTS = {
    "1": (1, ParallelConfig(), "none"),
    "1 full recompute": (1, ParallelConfig(), "full"),
    "1 light": (1, ParallelConfig(), "light on Transformer Engine"),
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


def as_routing(experts: list[Tensor]) -> list[Routing]:
    return [Routing.of(one.numpy()) for one in experts]


def forced(folder: Path, given: list[Tensor]) -> Any:
    """The HF model with the experts that stand in the list, [tokens, layers, K]; it chooses itself where they are -1."""
    model = reference.load(folder)
    for place, layer in enumerate(model.model.layers):

        def forward(hidden: Tensor, gate: Any = layer.mlp.gate, place: int = place) -> tuple[Tensor, Tensor, Tensor]:
            logits = hidden.reshape(-1, hidden.size(-1)) @ gate.weight.t()
            experts = logits.topk(TOPK).indices
            for token, chosen in enumerate(given[0][:, place].tolist()):
                if chosen[0] >= 0:
                    experts[token] = torch.tensor(chosen)
            return logits, logits.gather(1, experts).softmax(-1), experts

        layer.mlp.gate.forward = forward
    return model


@functools.cache
def expected(folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    given: list[Tensor] = [torch.empty(0)]
    model = forced(folder, given)
    logprobs = []
    total: dict[str, Tensor] = {}
    for number, sequence in enumerate(SEQUENCES):
        given[0] = another_engine()[number]
        with torch.no_grad():
            logprobs.append(reference.scores(model, sequence)[0])

        start, old = DATA.starts[number], DATA.old[number]
        model.zero_grad()
        logp, entropy = reference.scores(model, sequence)
        loss = reference.token_loss(logp[start:], entropy[start:], old[start:], DATA.advantages[number])
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
        replay_cases.replay, folder, parallel, SEQUENCES, DATA, BUDGET, as_routing(routing), recompute
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
        replay_cases.replay, folder, parallel, SEQUENCES, DATA, BUDGET, as_routing(another_engine()), recompute
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
        (lambda routing: [routing[0][:, :3], *routing[1:]], "tokens has routing of 6 experts a token"),
        (
            lambda routing: [routing[0].repeat(3, 1, 1), *routing[1:]],
            f"tokens from token 0 on; this model has {LAYERS} layers",
        ),
        (lambda routing: routing, "accepted"),
    ],
)
def test_routing_that_cannot_be_this_models_is_refused(planted: Any, words: str, workers: Any, hf_folder: Any) -> None:
    folder = hf_folder("qwen3_moe")
    answer = workers(1).run(replay_cases.refused, folder, SEQUENCES, BUDGET, as_routing(planted(routing_of(0))))[0]
    assert words in answer


@functools.cache
def samples(folder: Path) -> tuple[tuple[list[Sample], ...], list[Tensor], list[Tensor]]:
    """Groups of rollouts of another engine, every second under x' (x without its second token), with the log-probs that
    the forced HF model has of each response under x_roll and under x. The last was sampled by an engine that tells nothing."""
    given: list[Tensor] = [torch.empty(0)]
    model = forced(folder, given)
    groups: list[list[Sample]] = []
    under_roll, under_x = [], []
    for number, sequence in enumerate(SEQUENCES):
        tokens, start = tuple(sequence.tolist()), max(3, DATA.starts[number])
        purified, silent = number % 2 == 1, number == len(SEQUENCES) - 1
        prompt, response = tokens[:start], tokens[start:]
        roll = prompt[:1] + prompt[2:] if purified else prompt
        rows = another_engine()[number][:-1] if purified else another_engine()[number]
        rows = torch.full_like(rows, -1) if silent else rows

        def scored(x: tuple[int, ...], experts: Tensor, response: tuple[int, ...] = response) -> Tensor:
            given[0] = experts
            with torch.no_grad():
                return reference.scores(model, torch.tensor(x + response))[0][len(x) :]

        under_roll.append(scored(roll, rows))
        own = torch.full((start, LAYERS, TOPK), -1, dtype=rows.dtype)
        under_x.append(scored(prompt, torch.cat([own, rows[len(roll) :]]) if purified else rows))
        sample = Sample(
            f"p{number}", prompt, roll, response, tuple(under_roll[-1].tolist()), 1.0, purified, 1.0, 1.0, roll,
            None if silent else Routing.of(rows.numpy()),
        )  # fmt: skip
        groups.append([sample])
    return tuple(groups), under_roll, under_x


@pytest.mark.parametrize("layout", ["1", "tp2 pp2", "cp2", "ep2"])
@pytest.mark.parametrize("reuse", [True, False])
def test_an_update_has_the_engines_experts_in_every_pass(
    layout: str, reuse: bool, workers: Any, hf_folder: Any
) -> None:
    """pi_old with those of prompt and response under x_roll, pi_theta with those of the response under x."""
    world, parallel, _ = LAYOUTS[layout]
    groups, under_roll, under_x = samples(hf_folder("qwen3_moe"))
    every = [s for group in groups for s in group]
    old, now, metrics = workers(world).run(
        replay_cases.updated, hf_folder("qwen3_moe"), parallel, list(groups), BUDGET, reuse
    )[0]
    for sample, found, wanted in zip(every, old, under_roll, strict=True):
        assert (found is None) == (reuse and not sample.purified)
        if found is not None:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    for found, wanted in zip(now, under_x, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    # of the training pass itself: it agrees with the engine, and differs from pi_old by the prompt alone
    assert metrics["logprob_diff_max"] < 1e-4
    assert metrics["ratio_original"] == pytest.approx(1.0, abs=1e-4)
    ratios = torch.cat([(x - r).exp() for s, x, r in zip(every, under_x, under_roll, strict=True) if s.purified])
    assert metrics["ratio_purified"] == pytest.approx(float(ratios.mean()), rel=1e-3)


def test_those_experts_are_not_the_models_own(hf_folder: Any) -> None:
    """Otherwise the test above would pass without any replay, but for the one sample that has none."""
    groups, under_roll, _ = samples(hf_folder("qwen3_moe"))
    model = reference.load(hf_folder("qwen3_moe"))
    for [sample], forced_R in zip(groups, under_roll, strict=True):
        with torch.no_grad():
            own_R = reference.scores(model, torch.tensor(sample.roll_tokens + sample.response))[0][
                len(sample.roll_tokens) :
            ]
        assert (float((own_R - forced_R).abs().max()) > 1e-2) == (sample.routing is not None)


@pytest.mark.parametrize("layout", ["1", "ep2"])
def test_parity_with_the_files_is_judged_with_the_same_experts_in_bf16(
    layout: str, workers: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Routers that take another expert near a tie are no fault, and would hide one: experts that changed places are."""
    world, parallel, _ = LAYOUTS[layout]
    folder = tmp_path_factory.mktemp("many") / "model"
    save_many_experts(folder)
    said, own, replayed = workers(world).run(replay_cases.parity_in_bf16, folder, parallel, False)[0]
    assert said == []
    assert own > 2 * replayed
    said, _, _ = workers(world).run(replay_cases.parity_in_bf16, folder, parallel, True)[0]
    assert len(said) == 1 and "hf_parity" in said[0]


def save_many_experts(folder: Path) -> None:
    """Many choices, so that some are close, between experts that are nothing alike."""
    from transformers import AutoModelForCausalLM

    config = hf_config("qwen3_moe")
    config.num_experts, config.num_experts_per_tok, config.num_hidden_layers = 64, 4, 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
