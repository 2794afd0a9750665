"""One test per trap that the baselines' public code, or a literal reading of LENS, sets for a loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lens_megatron.algorithms.kl import kl_estimate
from lens_megatron.algorithms.loss_config import EngineCorrectionConfig, EntropySplitConfig, LossConfig
from lens_megatron.algorithms.loss_metrics import finish_metrics
from lens_megatron.algorithms.policy_loss import policy_loss
from lens_megatron.algorithms.token_masks import high_entropy_masks
from lens_megatron.presets import load_algorithm

from .minibatches import as_parameters, cut, denominators_of, gradient, pack, random_minibatch, whole
from .slow_loss import SlowSample, slow_high_masks

NO_KL = LossConfig(kl_coef=0.0)


def sample(log_ratios: list[float], advantage: float = 1.0, **changes: object) -> tuple[SlowSample, list[float]]:
    """A sample whose log pi_theta is -1 everywhere and whose pi_old is `log_ratios` below."""
    current = [-1.0] * len(log_ratios)
    old = [-1.0 - value for value in log_ratios]
    made = SlowSample(0, advantage, 1.0, False, old, list(old), list(current), list(old), list(old), [0.0] * len(old))
    return replace(made, **changes), current  # type: ignore[arg-type]


def loss_and_gradient(
    samples: list[tuple[SlowSample, list[float]]], config: LossConfig
) -> tuple[float, torch.Tensor, dict[str, float]]:
    batch, current = [s for s, _ in samples], as_parameters([values for _, values in samples])
    loss, sums = whole(batch, current, config)
    return loss.item(), gradient(loss, current), finish_metrics(sums)


def test_eq_5_purified_ratio_is_not_one_at_the_first_update() -> None:
    """pi_theta = pi_old in weights: under x for originals the ratio is 1, under x' for purified ones it is not.

    The second half shows what is left when pi_old is scored under x for both.
    """
    under_x, under_x_prime = [-3.0, -1.0], [-0.5, -1.2]
    original = SlowSample(0, -1.0, 1.0, False, under_x, under_x, under_x, under_x, under_x, [0.0, 0.0])
    purified = replace(original, advantage=1.0, purified=True, proximal=under_x_prime, under_x_prime=under_x_prime)
    _, _, metrics = loss_and_gradient([(original, under_x), (purified, under_x)], NO_KL)
    assert metrics["ratio_original"] == 1.0
    assert metrics["ratio_purified"] == pytest.approx((math.exp(-2.5) + math.exp(0.2)) / 2)
    assert metrics["rho_purified_below_0.3"] == 0.5 and metrics["rho_purified_above_1.2"] == 0.5

    trapped = replace(purified, proximal=under_x)
    _, grad, metrics = loss_and_gradient([(original, under_x), (trapped, under_x)], NO_KL)
    assert metrics["ratio_purified"] == 1.0
    _, uncorrected, _ = loss_and_gradient(
        [(original, under_x), (purified, under_x)], replace(NO_KL, purified_ratio="none")
    )
    torch.testing.assert_close(grad, uncorrected)  # the trap is the `none` ablation, silently


def test_literal_clip_kills_what_x_makes_likely_and_shrinks_what_it_makes_unlikely() -> None:
    """At the first update, with A > 0: rho > 1.2 has no gradient, rho < 1 is scaled by rho."""
    _, grad, _ = loss_and_gradient([sample([0.5, -2.0], purified=True)], NO_KL)
    assert grad[0] == 0
    assert grad[1].item() == pytest.approx(-math.exp(-2.0) / 2)


def test_floor_keeps_the_gradient_that_a_clamp_inside_the_surrogate_would_cut() -> None:
    _, grad, _ = loss_and_gradient([sample([-2.0, -0.5], purified=True)], replace(NO_KL, purified_ratio="floor(0.3)"))
    torch.testing.assert_close(grad, torch.tensor([-0.3, -math.exp(-0.5)], dtype=torch.float64) / 2)
    logprob = torch.tensor(-1.0, requires_grad=True)
    (inside,) = torch.autograd.grad(torch.clamp(torch.exp(logprob - 1.0), 0.3, 1.0), logprob)
    assert inside == 0


def test_the_kl_is_never_multiplied_by_the_weights() -> None:
    config = LossConfig(kl_coef=1.0)
    batch, current = random_minibatch(3, config)
    batch = [replace(s, weight=0.0) for s in batch]
    loss, _ = whole(batch, as_parameters(current), config)
    logs = [r - c for s, row in zip(batch, current, strict=True) for r, c in zip(s.reference, row, strict=True)]
    assert loss.item() == pytest.approx(sum(math.exp(v) - 1 - v for v in logs) / len(logs))


def test_token_mean_is_global_not_per_micro_batch() -> None:
    """Micro-batches of 1 and 9 tokens: the mean of their two means would weigh one token as nine (DAPO)."""
    short, long = sample([0.0], advantage=1.0), sample([0.0] * 9, advantage=-1.0)
    batch, current = [short[0], long[0]], as_parameters([short[1], long[1]])
    loss, _ = cut(batch, current, NO_KL, [[0], [1]])
    assert loss.item() == pytest.approx((-1 * 1 + 1 * 9) / 10)
    assert loss.item() != pytest.approx((-1 + 1) / 2)


def test_dual_clip_bounds_negative_advantages_at_ten() -> None:
    config = load_algorithm("dapo").loss
    loss, grad, _ = loss_and_gradient([sample([math.log(12.0)], advantage=-1.0)], config)
    assert loss == pytest.approx(10.0) and grad.abs().max() == 0
    loss, grad, _ = loss_and_gradient([sample([math.log(9.0)], advantage=-1.0)], config)
    assert loss == pytest.approx(9.0) and grad.abs().max() > 0


def test_dapo_clips_high_at_0_28_and_low_at_0_2() -> None:
    config = load_algorithm("dapo").loss
    _, grad, metrics = loss_and_gradient([sample([math.log(1.27), math.log(1.29)])], config)
    assert grad[0] != 0 and grad[1] == 0 and metrics["clip_fraction_high"] == 0.5
    _, grad, metrics = loss_and_gradient([sample([math.log(0.81), math.log(0.79)], advantage=-1.0)], config)
    assert grad[0] != 0 and grad[1] == 0 and metrics["clip_fraction_low"] == 0.5


def archer_pair(log_ratio: float) -> list[tuple[SlowSample, list[float]]]:
    """One response whose last token alone is above the 0.8 quantile of its entropy."""
    made = sample([log_ratio] * 6, entropy=[0.1, 0.2, 0.3, 0.4, 0.5, 5.0])
    split = load_algorithm("archer").loss.entropy_split
    assert split is not None
    (mask,) = high_entropy_masks([torch.tensor(made[0].entropy)], split)
    made[0].high = mask.tolist()
    return [made]


def test_archers_mask_marks_high_entropy_tokens_and_its_clips_are_alive() -> None:
    """In the public code `high_entropy_mask` is True on LOW entropy, and the clips of the launch script go nowhere."""
    pair = archer_pair(math.log(1.4))  # inside +-0.5, outside +-0.2
    assert pair[0][0].high == [False] * 5 + [True]
    config = load_algorithm("archer").loss
    _, grad, metrics = loss_and_gradient(pair, replace(config, kl_coef=0.0))
    assert (grad[:5] == 0).all() and grad[5] != 0
    assert metrics["clip_fraction"] == pytest.approx(5 / 6)
    assert config.entropy_split is not None
    for name, value, alive in (("high_clip_high", 0.3, [5]), ("clip_high", 0.45, [0, 1, 2, 3, 4, 5])):
        changed = (
            config
            if name == "clip_high"
            else replace(config, entropy_split=replace(config.entropy_split, **{name: value}))
        )
        changed = replace(changed, clip_high=value) if name == "clip_high" else changed
        _, moved, _ = loss_and_gradient(pair, replace(changed, kl_coef=0.0))
        assert [i for i in range(6) if moved[i] != 0] == ([] if alive == [5] else alive)


def test_archers_two_kls_are_each_averaged_over_their_own_tokens() -> None:
    config = load_algorithm("archer").loss
    assert config.entropy_split is not None
    pair = archer_pair(0.0)
    pair[0] = (replace(pair[0][0], advantage=0.0, reference=[-1.5] * 5 + [-3.0]), pair[0][1])
    low, high = math.exp(-0.5) - 1 + 0.5, math.exp(-2.0) - 1 + 2.0
    assert loss_and_gradient(pair, config)[0] == pytest.approx(0.001 * low)  # not 5/6 of it; high-entropy KL 0
    both = replace(config, entropy_split=replace(config.entropy_split, high_kl_coef=0.01))
    assert loss_and_gradient(pair, both)[0] == pytest.approx(0.001 * low + 0.01 * high)


def test_aspo_turns_the_ratio_over_for_positive_advantages_only() -> None:
    config = replace(load_algorithm("archer2").loss, kl_coef=0.0, entropy_split=None)
    _, grad, _ = loss_and_gradient([sample([math.log(0.5), math.log(0.2), math.log(1.3)])], config)
    torch.testing.assert_close(grad, torch.tensor([-2.0, -3.0, 0.0], dtype=torch.float64) / 3)  # 1/rho, at most c = 3
    _, grad, _ = loss_and_gradient([sample([math.log(1.5), math.log(3.5)], advantage=-1.0)], config)
    torch.testing.assert_close(grad, torch.tensor([1.5, 0.0], dtype=torch.float64) / 2)


def test_cispo_drops_no_tokens_gradient() -> None:
    config = load_algorithm("cispo").loss
    _, grad, metrics = loss_and_gradient([sample([math.log(3.0), math.log(0.01)])], config)
    torch.testing.assert_close(grad, torch.tensor([-1.28, -0.01], dtype=torch.float64) / 2)
    assert metrics["clip_fraction_high"] == 0.5


def test_80_20_takes_the_quantile_of_the_batch_and_divides_by_the_selected() -> None:
    """Ten tokens, two selected, both in the second response; `full` makes the same step five times smaller."""
    config = replace(NO_KL, entropy_split=EntropySplitConfig(scope="batch", high_share=0.2, train_on="high"))
    quiet, loud = sample([0.0] * 5, entropy=[0.1] * 5), sample([0.0] * 5, entropy=[1.0, 9.0, 1.0, 8.0, 1.0])
    assert config.entropy_split is not None
    masks = high_entropy_masks([torch.tensor(s.entropy) for s, _ in (quiet, loud)], config.entropy_split)
    quiet[0].high, loud[0].high = (mask.tolist() for mask in masks)
    assert quiet[0].high == [False] * 5 and loud[0].high == [False, True, False, True, False]
    _, selected, metrics = loss_and_gradient([quiet, loud], config)
    assert selected.tolist() == [0.0] * 6 + [-0.5, 0.0, -0.5, 0.0]
    assert metrics["policy_token_share"] == pytest.approx(0.2)
    full_config = replace(config, entropy_split=replace(config.entropy_split, denominator="full"))
    _, full, _ = loss_and_gradient([quiet, loud], full_config)
    torch.testing.assert_close(selected, 5 * full)


def test_80_20_selection_does_not_depend_on_micro_batches() -> None:
    """A quantile per micro-batch would select in the quiet response too; masks made beforehand cannot."""
    config = load_algorithm("forking").loss
    assert config.entropy_split is not None
    entropies = [[0.1, 0.2, 0.3, 0.4, 0.5], [5.0, 6.0, 7.0, 8.0, 9.0]]
    masks = high_entropy_masks([torch.tensor(row) for row in entropies], config.entropy_split)
    assert [mask.sum().item() for mask in masks] == [0, 2]
    alone = high_entropy_masks([torch.tensor(entropies[0])], config.entropy_split)
    assert alone[0].sum() == 1


@pytest.mark.parametrize("scope", ["batch", "response"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.07, 0.5])
def test_entropy_masks_against_sorting(scope: str, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 40, (5,), generator=generator).tolist()
        rows = [torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
        split = EntropySplitConfig(scope=scope, high_share=share)  # type: ignore[arg-type]
        found = [mask.tolist() for mask in high_entropy_masks(rows, split)]
        assert found == slow_high_masks([row.tolist() for row in rows], scope, share)


def test_a_share_that_is_an_integer_on_paper_selects_that_many() -> None:
    """0.07 x 100 is 7.000000000000001 in floats, whose ceiling is 8."""
    (mask,) = high_entropy_masks([torch.rand(100)], EntropySplitConfig(high_share=0.07))
    assert mask.sum() == 7


def test_engine_mismatch_never_enters_the_ppo_ratio() -> None:
    """Engine 4 times less sure than the trainer: a weight min(4, 2) outside the clip, whose ratio stays 1."""
    off = sample([0.0], behaviour=[-1.0 - math.log(4.0)])
    config = replace(NO_KL, engine_correction=EngineCorrectionConfig("truncate", cap=2.0))
    loss, grad, metrics = loss_and_gradient([off], config)
    assert loss == pytest.approx(-2.0) and grad.item() == pytest.approx(-2.0)
    assert metrics["ratio_original"] == 1.0 and metrics["clip_fraction"] == 0.0
    assert metrics["logprob_diff"] == pytest.approx(math.log(4.0)) == metrics["logprob_diff_max"]
    masked = replace(config, engine_correction=EngineCorrectionConfig("mask_tokens", cap=2.0, floor=0.5))
    loss, grad, metrics = loss_and_gradient([off], masked)
    assert loss == 0 and grad.item() == 0 and metrics["engine_dropped"] == 1.0


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("split", [None, "selected", "full"])
def test_a_token_left_out_makes_no_other_louder(aggregation: str, split: str | None) -> None:
    """One of two selected tokens is not trusted: the other's gradient stays what it was."""
    entropy_split = split and EntropySplitConfig(train_on="high", denominator=split)  # type: ignore[arg-type]
    config = replace(NO_KL, aggregation=aggregation, entropy_split=entropy_split)  # type: ignore[arg-type]
    made, current = sample([0.1] * 4, high=[False, True, True, False])
    gradients = []
    for trusted in ([True] * 4, [True, True, False, True]):
        logprobs = as_parameters([current])
        inputs = pack([made], logprobs, config, trusted_T=torch.tensor([True, True, *trusted, True]))  # prompt, padding
        gradients.append(gradient(policy_loss(inputs, config, denominators_of([made], config))[0], logprobs))
    everything, left_out = gradients
    assert everything[1] != 0 and everything[2] != 0 and left_out[2] == 0
    assert left_out[[0, 1, 3]].tolist() == everything[[0, 1, 3]].tolist()


def test_the_mismatch_is_reported_without_a_correction() -> None:
    batch, current = random_minibatch(0, NO_KL)
    behaviour = pack(batch, as_parameters(current), LossConfig(engine_correction=EngineCorrectionConfig("truncate")))
    inputs = pack(batch, as_parameters(current), NO_KL, behaviour_logprobs_T=behaviour.behaviour_logprobs_T)
    loss, sums = policy_loss(inputs, NO_KL, denominators_of(batch, NO_KL))
    expected = [abs(a - b) for s in batch for a, b in zip(s.proximal, s.behaviour, strict=True)]
    assert finish_metrics(sums)["logprob_diff"] == pytest.approx(sum(expected) / len(expected))
    assert loss.item() == pytest.approx(whole(batch, as_parameters(current), NO_KL)[0].item())


def test_mixture_of_the_same_prompt_twice_is_plain_ppo() -> None:
    for form in ("mixture(token)", "mixture(sequence)"):
        batch, current = random_minibatch(5, NO_KL, rescued=False)
        plain = whole(batch, as_parameters(current), NO_KL)[0]
        mixed = whole(batch, as_parameters(current), replace(NO_KL, purified_ratio=form))[0]
        torch.testing.assert_close(mixed, plain)


def test_mixture_has_the_ratio_to_the_mixture_at_the_first_update() -> None:
    """pi_theta = pi_old under x: the gradient is pi(x) / (1/2 pi(x) + 1/2 pi(x')), at most 2, and none is clipped."""
    under_x, under_x_prime = [-1.0, -4.0], [-5.0, -0.5]
    made, _ = sample([0.0, 0.0])
    made = replace(made, purified=True, proximal=under_x_prime, under_x=under_x, under_x_prime=under_x_prime)
    _, grad, _ = loss_and_gradient([(made, under_x)], replace(NO_KL, purified_ratio="mixture(token)"))
    expected = [
        math.exp(x) / (0.5 * math.exp(x) + 0.5 * math.exp(y)) for x, y in zip(under_x, under_x_prime, strict=True)
    ]
    assert grad.tolist() == pytest.approx([-value / 2 for value in expected])
    assert expected[0] > 1.2  # what a clip of the product would have cut off


@pytest.mark.parametrize("apart", [19.0, 25.0, 80.0])
def test_k3_pulls_towards_the_reference_however_far_away_it_is(apart: float) -> None:
    """A clamped exponential has no gradient beyond its bound, and what is left of k3 pushes the other way."""
    log_pi_T = torch.tensor([-apart], requires_grad=True)
    kl_estimate(log_pi_T, torch.tensor([0.0]), "k3").sum().backward()
    assert log_pi_T.grad is not None and torch.isfinite(log_pi_T.grad).all()
    assert log_pi_T.grad.item() == pytest.approx(1 - math.exp(min(apart, 20.0)), rel=1e-5)


def test_effective_size_of_purified_rollouts_by_hand() -> None:
    rows = [sample([math.log(0.5)], purified=True), sample([math.log(1.5)], purified=True), sample([0.3])]
    _, _, metrics = loss_and_gradient(rows, NO_KL)
    assert metrics["effective_size_rho_purified_tokens"] == pytest.approx(2.0**2 / (2 * (0.25 + 2.25)))
    assert metrics["effective_size_rho_purified_sequences"] == pytest.approx(2.0**2 / (2 * (0.25 + 2.25)))
    # a sequence counts once, however long it is: ratios 0.5 and 0.5 x 3
    rows = [sample([math.log(0.5)], purified=True), sample([math.log(0.5), math.log(3.0)], purified=True)]
    _, _, metrics = loss_and_gradient(rows, NO_KL)
    assert metrics["effective_size_rho_purified_sequences"] == pytest.approx(2.0**2 / (2 * (0.25 + 2.25)))
    assert metrics["effective_size_rho_purified_tokens"] == pytest.approx(4.0**2 / (3 * (0.25 + 0.25 + 9.0)))


def test_signed_token_mass_shows_what_a_token_mean_does_to_a_balanced_group() -> None:
    """Advantages sum to 0; a failure nine times as long carries nine times the mass."""
    _, _, metrics = loss_and_gradient([sample([0.0], advantage=1.0), sample([0.0] * 9, advantage=-1.0)], NO_KL)
    assert metrics["positive_mass"] == pytest.approx(0.1) and metrics["negative_mass"] == pytest.approx(-0.9)


def test_a_mean_over_nothing_is_nan() -> None:
    _, _, metrics = loss_and_gradient([sample([0.0])], NO_KL)
    assert math.isnan(metrics["ratio_purified"]) and math.isnan(metrics["effective_size_rho_purified_tokens"])
