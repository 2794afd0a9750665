"""Importance ratios: pi_theta over pi_old (PPO, Eq. 5, GSPO, the mixture), and trainer over engine, kept apart.

Shape suffixes: T tokens, S samples. The trap of Eq. 5: pi_old of a purified rollout is under x', pi_theta under x. Both
scored under x, the ratio is 1 at the first update and the correction is gone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lens_megatron.algorithms.loss_config import LossConfig, RatioLevel
from lens_megatron.algorithms.loss_inputs import LossInputs

# exp(20) is far outside every clip range; beyond it a sequence's ratio would overflow and its gradient become NaN
MAX_LOG_RATIO = 20.0


def bounded_exp(log_T: Tensor) -> Tensor:
    return torch.exp(log_T.clamp(max=MAX_LOG_RATIO))


def literal_log_ratio(inputs: LossInputs) -> Tensor:
    """log rho_t of Eq. 5: pi_theta under x, pi_old under the prompt the rollout was sampled from."""
    return inputs.masked(inputs.current_logprobs_T) - inputs.masked(inputs.proximal_logprobs_T)


def log_ratio(inputs: LossInputs, config: LossConfig) -> Tensor:
    """The loss's own log-ratio, per token, or per sample and repeated for its tokens."""
    kind = config.purified.kind
    if kind in ("none", "mixture"):
        assert inputs.proximal_original_logprobs_T is not None
        current_T = inputs.masked(inputs.current_logprobs_T)
        log_ratio_T = current_T - inputs.masked(inputs.proximal_original_logprobs_T)
    else:
        log_ratio_T = literal_log_ratio(inputs)
    result_T = at_level(log_ratio_T, inputs, config.ratio)
    if kind == "gspo" and config.ratio != "length_normalised":
        by_length_T = at_level(log_ratio_T, inputs, "length_normalised")
        result_T = torch.where(inputs.to_tokens(inputs.purified_S), by_length_T, result_T)
    return result_T


def at_level(log_ratio_T: Tensor, inputs: LossInputs, level: RatioLevel) -> Tensor:
    """Token log-ratios as they are, summed over the sample, or averaged over it."""
    if level == "token":
        return log_ratio_T
    log_ratio_S = inputs.per_sample(log_ratio_T)
    if level == "length_normalised":
        log_ratio_S = log_ratio_S / inputs.response_lengths_S.clamp(min=1)
    return inputs.masked(inputs.to_tokens(log_ratio_S))


def mixture_weight(inputs: LossInputs, config: LossConfig) -> Tensor:
    """pi_old(y|x) / (1/2 pi_old(y|x) + 1/2 pi_old(y|x')): at most 2, 1 where the prompt was not purified, no gradient.

    Times PPO's ratio under x it is pi_theta(y|x) over the mixture that Y and Y' together are drawn from. The trust
    region stays on PPO's ratio: clipping the product would cut off originals unlikely under x' at the first update.
    """
    assert inputs.proximal_original_logprobs_T is not None and inputs.proximal_purified_logprobs_T is not None
    original_T = inputs.masked(inputs.proximal_original_logprobs_T.detach())
    purified_T = inputs.masked(inputs.proximal_purified_logprobs_T.detach())
    if config.purified.level == "sequence":
        original_T = inputs.to_tokens(inputs.per_sample(original_T))
        purified_T = inputs.to_tokens(inputs.per_sample(purified_T))
    return torch.exp(original_T - torch.logaddexp(original_T, purified_T) + math.log(2.0))


def engine_log_weight(inputs: LossInputs) -> Tensor | None:
    """log pi_proximal - log pi_behaviour, both under the prompt it was sampled from: the train/engine mismatch."""
    if inputs.behaviour_logprobs_T is None:
        return None
    return inputs.masked(inputs.proximal_logprobs_T.detach()) - inputs.masked(inputs.behaviour_logprobs_T)


def engine_weight(inputs: LossInputs, config: LossConfig) -> Tensor | None:
    """Truncated importance weights against the engine; 0 for what the mask variants drop."""
    correction = config.engine_correction
    if correction.mode == "none":
        return None
    log_T = engine_log_weight(inputs)
    assert log_T is not None
    weight_T = bounded_exp(log_T)
    truncated_T = weight_T.clamp(max=correction.cap)
    if correction.mode == "truncate":
        return truncated_T
    measured_T = (
        weight_T if correction.mode == "mask_tokens" else bounded_exp(at_level(log_T, inputs, "length_normalised"))
    )
    inside_T = (measured_T >= correction.floor) & (measured_T <= correction.cap)
    return torch.where(inside_T, truncated_T, torch.zeros_like(truncated_T))
