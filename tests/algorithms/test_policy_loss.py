"""The whole loss: value against a slow reference, gradient against finite differences, both whatever the cut."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.algorithms.advantages import AdvantageConfig
from lens_megatron.algorithms.loss_config import EngineCorrectionConfig, EntropySplitConfig, LossConfig
from lens_megatron.algorithms.policy_loss import policy_loss
from lens_megatron.presets import load_algorithm, preset_names

from .minibatches import as_parameters, cut, denominators_of, gradient, pack, random_minibatch, spread_over_ranks, whole
from .slow_loss import SlowSample, slow_loss

WEIGHTED = AdvantageConfig(std="population", weights="all")


def correction(mode: str) -> EngineCorrectionConfig:
    return EngineCorrectionConfig(mode=mode, cap=1.5, floor=0.7)


# beyond what the presets combine
VARIANTS = {
    "sequence_ratio": LossConfig(ratio="sequence", clip_low=0.5, clip_high=0.5),
    "sequence_ratio_sum": LossConfig(ratio="sequence", aggregation="sum", clip_low=0.5, clip_high=0.5),
    "token_ratio_sum": LossConfig(aggregation="sum"),
    "sequence_mean": LossConfig(aggregation="sequence_mean", entropy_coef=0.01),
    "k2_original": LossConfig(kl="k2", kl_coef=0.1, kl_scope="original", aggregation="sequence_mean"),
    "power": LossConfig(purified_ratio="power(0.5)"),
    "luffy": LossConfig(purified_ratio="luffy", kl_coef=0.0),
    "purified_gspo": LossConfig(purified_ratio="gspo"),
    "mixture_token": LossConfig(purified_ratio="mixture(token)"),
    "mixture_sequence": LossConfig(purified_ratio="mixture(sequence)", aggregation="sequence_mean"),
    "none_by_sequence": LossConfig(purified_ratio="none", ratio="sequence", clip_low=0.5, clip_high=0.5),
    "imitation": LossConfig(imitation_coef=0.1),
    "truncate": LossConfig(engine_correction=correction("truncate")),
    "mask_tokens": LossConfig(engine_correction=correction("mask_tokens")),
    "mask_sequences": LossConfig(engine_correction=correction("mask_sequences")),
    "low_tokens_full": LossConfig(entropy_split=EntropySplitConfig(train_on="low", denominator="full")),
    "high_by_sequence": LossConfig(
        entropy_split=EntropySplitConfig(high_share=0.4, train_on="high"), aggregation="sequence_mean"
    ),
    "cispo_floor": LossConfig(surrogate="cispo", purified_ratio="floor(0.9)"),
}
CASES = [f"preset:{name}" for name in preset_names()] + list(VARIANTS)


def case(name: str, seed: int) -> tuple[LossConfig, list[SlowSample], list[list[float]]]:
    if not name.startswith("preset:"):
        return VARIANTS[name], *random_minibatch(seed, VARIANTS[name], WEIGHTED)
    algorithm = load_algorithm(name.removeprefix("preset:"))
    rescued = algorithm.rescue.mode != "none"
    return algorithm.loss, *random_minibatch(seed, algorithm.loss, algorithm.advantage, rescued)


@pytest.mark.parametrize("name", CASES)
def test_value_is_that_of_the_slow_reference(name: str) -> None:
    for seed in range(3):
        config, batch, current = case(name, seed)
        loss, _ = whole(batch, as_parameters(current), config)
        assert loss.item() == pytest.approx(slow_loss(batch, config, current, current), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    config, batch, current = case(name, 11)
    logprobs = as_parameters(current)
    found = gradient(whole(batch, logprobs, config)[0], logprobs)
    step, expected = 1e-6, []
    for sample, values in enumerate(current):
        for token in range(len(values)):
            sides = []
            for sign in (1, -1):
                moved = [list(row) for row in current]
                moved[sample][token] += sign * step
                sides.append(slow_loss(batch, config, moved, current))
            expected.append((sides[0] - sides[1]) / (2 * step))
    assert found.abs().max() > 1e-5  # a loss without a gradient would pass the next line
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_micro_batches_and_context_parallel_ranks_add_up(name: str, seed: int) -> None:
    config, batch, current = case(name, seed)
    logprobs = as_parameters(current)
    loss, sums = whole(batch, logprobs, config)
    grad = gradient(loss, logprobs)
    rng = random.Random(seed)
    order = rng.sample(range(len(batch)), len(batch))
    pieces: list[list[int]] = [[] for _ in range(rng.randint(1, 5))]
    for index in order:
        rng.choice(pieces).append(index)
    ways = {
        "cut": cut(batch, logprobs, config, [piece for piece in pieces if piece]),
        "ranks": spread_over_ranks(batch, logprobs, config, rng.randint(2, 3), seed),
    }
    for way, (other_loss, other_sums) in ways.items():
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=1e-12, msg=way)
        torch.testing.assert_close(gradient(other_loss, logprobs), grad, rtol=1e-9, atol=1e-12)
        assert other_sums.keys() == sums.keys()
        for metric, value in sums.items():
            torch.testing.assert_close(other_sums[metric], value, rtol=1e-9, atol=1e-12, msg=f"{way}: {metric}")


def test_an_entropy_bonus_has_the_gradient_of_the_mean_entropy() -> None:
    config = LossConfig(entropy_coef=0.5, kl_coef=0.0)
    batch, current = random_minibatch(0, config)
    entropy_T = torch.rand(sum(len(s) + 3 for s in batch), dtype=torch.float64, requires_grad=True)
    inputs = pack(batch, as_parameters(current), config, entropy_T=entropy_T)
    loss, _ = policy_loss(inputs, config, denominators_of(batch, config))
    (grad,) = torch.autograd.grad(loss, entropy_T)
    expected = torch.where(inputs.response_mask_T, -0.5 / sum(len(s) for s in batch), 0.0).double()
    torch.testing.assert_close(grad, expected)


def test_a_micro_batch_that_only_fills_the_schedule_adds_nothing() -> None:
    config = LossConfig()
    batch, _current = random_minibatch(0, config)
    empty = SlowSample(0, 1.0, 1.0, False, [], [], [], [], [], [])
    logprobs = as_parameters([[]])
    loss, _ = policy_loss(pack([empty], logprobs, config), config, denominators_of(batch, config))
    assert loss.item() == 0.0


def test_extreme_log_ratios_stay_finite() -> None:
    for ratio in ("token", "sequence"):
        config = LossConfig(ratio=ratio, dual_clip=10.0)
        batch, current = random_minibatch(0, config)
        logprobs = as_parameters(
            [[value - 500.0 if i % 2 else value for value in row] for i, row in enumerate(current)]
        )
        for sample in batch[::3]:
            sample.proximal = [value - 500.0 for value in sample.proximal]
        loss, _ = whole(batch, logprobs, config)
        assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logprobs)).all()


def test_a_loss_without_what_it_reads_says_what_is_missing() -> None:
    batch, current = random_minibatch(0, LossConfig(kl_coef=0.0))
    with pytest.raises(ValueError, match="reference_logprobs_T"):
        inputs = pack(batch, as_parameters(current), LossConfig(kl_coef=0.0))
        policy_loss(inputs, LossConfig(), denominators_of(batch, LossConfig()))
