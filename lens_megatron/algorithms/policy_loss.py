"""The loss of one micro-batch: LENS Eq. 7 and its relatives, one function for all of them.

    loss = - sum_t scale_t w~ v_t surrogate_t + KL - entropy bonus - imitation

scale_t holds the global denominators (loss_inputs.Denominators), w~ is the sample's weight (Eq. 4), v_t collects
weights without gradient: truncated importance sampling against the engine, and the mixture's. Everything is a sum over
this rank's tokens, so that micro-batches and ranks add up to the mini-batch's loss whatever the cut.

Shape suffixes: T tokens of the packed micro-batch, S its samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_megatron.algorithms.kl import kl_loss, token_kl
from lens_megatron.algorithms.loss_config import LossConfig
from lens_megatron.algorithms.loss_inputs import Denominators, LossInputs
from lens_megatron.algorithms.loss_metrics import MetricTerms, metric_sums
from lens_megatron.algorithms.ratios import bounded_exp, engine_weight, log_ratio, mixture_weight
from lens_megatron.algorithms.surrogates import SURROGATES, Surrogate, SurrogateTerms, purified_value
from lens_megatron.own_functions import named


def policy_loss(inputs: LossInputs, config: LossConfig, denominators: Denominators) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the mini-batch's loss, and metric sums for `loss_metrics.finish_metrics`."""
    inputs.check(config)
    mask_T = policy_mask(inputs, config)
    surrogate = token_surrogate(inputs, config)
    scale_T = policy_scale(mask_T, inputs, config, denominators)
    weight_T = inputs.to_tokens(inputs.weights_S)
    correction_T = engine_weight(inputs, config)
    if correction_T is not None:
        weight_T = weight_T * correction_T
    if config.purified.kind == "mixture":
        weight_T = weight_T * mixture_weight(inputs, config)
    policy = -(scale_T * weight_T * surrogate.value_T).sum()

    parts = {"policy_loss": policy}
    kl_T = token_kl(inputs, config.kl)
    if config.any_kl and kl_T is not None:
        parts["kl_loss"] = kl_loss(kl_T, inputs, config, denominators)
    if config.entropy_coef:
        entropy_T = inputs.masked(inputs.entropy_T) * response_scale(inputs, config, denominators)
        parts["entropy_loss"] = -config.entropy_coef * entropy_T.sum()
    if config.imitation_coef:
        purified_T = inputs.response_mask_T & inputs.to_tokens(inputs.purified_S)
        logprobs_T = torch.where(purified_T, inputs.current_logprobs_T, torch.zeros_like(inputs.current_logprobs_T))
        parts["imitation_loss"] = -config.imitation_coef * logprobs_T.sum() / max(denominators.purified_tokens, 1.0)
    loss = torch.stack(list(parts.values())).sum()

    with torch.no_grad():
        terms = MetricTerms(
            mask_T=mask_T,
            weighted_advantage_T=scale_T * weight_T * inputs.to_tokens(inputs.advantages_S),
            clipped_low_T=surrogate.clipped_low_T,
            clipped_high_T=surrogate.clipped_high_T,
            kl_T=kl_T,
            engine_weight_T=correction_T,
        )
        sums = metric_sums(inputs, config, terms, {"loss": loss, **parts})
    return loss, sums


def policy_mask(inputs: LossInputs, config: LossConfig) -> Tensor:
    """The tokens that carry the policy gradient."""
    selected_T = selected_tokens(inputs, config)
    return selected_T if inputs.trusted_T is None else selected_T & inputs.trusted_T


def selected_tokens(inputs: LossInputs, config: LossConfig) -> Tensor:
    """The response tokens that the entropy split trains on, trusted or not: those left out keep their place in means."""
    split = config.entropy_split
    if split is None or split.train_on == "all":
        return inputs.response_mask_T
    assert inputs.high_entropy_T is not None
    return inputs.response_mask_T & (inputs.high_entropy_T if split.train_on == "high" else ~inputs.high_entropy_T)


def token_surrogate(inputs: LossInputs, config: LossConfig) -> Surrogate:
    """Every token's surrogate, those of purified rollouts by `purified_ratio`. Finite on masked tokens too."""
    clip_low_T, clip_high_T = clip_ranges(inputs, config)
    terms = SurrogateTerms(
        ratio_T=bounded_exp(log_ratio(inputs, config)),
        current_logprobs_T=inputs.masked(inputs.current_logprobs_T),
        advantages_T=inputs.to_tokens(inputs.advantages_S),
        clip_low_T=clip_low_T,
        clip_high_T=clip_high_T,
        dual_clip=config.dual_clip,
    )
    surrogate = named(config.surrogate, SURROGATES)(terms)
    purified = config.purified
    if purified.kind in ("floor", "power", "luffy"):
        purified_T = inputs.to_tokens(inputs.purified_S)
        replaced_T = purified_value(purified.kind, purified.value, terms)
        return Surrogate(
            torch.where(purified_T, replaced_T, surrogate.value_T),
            surrogate.clipped_low_T & ~purified_T,
            surrogate.clipped_high_T & ~purified_T,
        )
    return surrogate


def clip_ranges(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Clip low and high of each token: Archer gives high-entropy tokens wider ones."""
    like_T = inputs.proximal_logprobs_T
    low_T, high_T = torch.full_like(like_T, config.clip_low), torch.full_like(like_T, config.clip_high)
    split = config.entropy_split
    if split is not None:
        assert inputs.high_entropy_T is not None
        if split.high_clip_low is not None:
            low_T = low_T.masked_fill(inputs.high_entropy_T, split.high_clip_low)
        if split.high_clip_high is not None:
            high_T = high_T.masked_fill(inputs.high_entropy_T, split.high_clip_high)
    return low_T, high_T


def policy_scale(mask_T: Tensor, inputs: LossInputs, config: LossConfig, denominators: Denominators) -> Tensor:
    """What each token's surrogate is multiplied by; 0 outside the mask."""
    scale_T = mask_T.to(inputs.proximal_logprobs_T.dtype)
    if config.aggregation == "token_mean":
        return scale_T / max(denominators.policy_tokens, 1.0)
    if config.aggregation == "sum" and config.ratio == "token":
        return scale_T / max(denominators.groups, 1.0)
    split = config.entropy_split
    lengths_S = inputs.response_lengths_S
    if split is not None and split.train_on != "all" and split.denominator == "selected":
        lengths_S = inputs.per_sample(selected_tokens(inputs, config).to(scale_T.dtype))
    scale_T = scale_T / inputs.to_tokens(lengths_S.clamp(min=1))
    # a sequence's one surrogate, under `sum`, counts once however many tokens carry it
    return scale_T / max(denominators.groups if config.aggregation == "sum" else denominators.sequences, 1.0)


def response_scale(inputs: LossInputs, config: LossConfig, denominators: Denominators) -> Tensor | float:
    """Mean over all response tokens, or over the sequences' means."""
    if config.aggregation == "token_mean":
        return 1.0 / max(denominators.tokens, 1.0)
    lengths_T = inputs.to_tokens(inputs.response_lengths_S.clamp(min=1)).to(inputs.entropy_T.dtype)
    return 1.0 / (lengths_T * max(denominators.sequences, 1.0))
