"""Token estimates of KL(pi_theta || pi_ref) on the original prompt, and their loss. Shape suffix: T tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_megatron.algorithms.loss_config import LossConfig
from lens_megatron.algorithms.loss_inputs import Denominators, LossInputs
from lens_megatron.algorithms.ratios import MAX_LOG_RATIO, bounded_exp


def kl_estimate(
    current_logprobs_T: Float[Tensor, " T"], reference_logprobs_T: Float[Tensor, " T"], kind: Literal["k1", "k2", "k3"]
) -> Float[Tensor, " T"]:
    """k1: log pi/pi_ref, whose gradient as a loss averages to 0; k2: half its square; k3: unbiased, low variance.

    Named after Schulman's note "Approximating KL divergence". Per sampled token, without a sum over the vocabulary.
    """
    log_ratio_T = current_logprobs_T - reference_logprobs_T
    if kind == "k1":
        return log_ratio_T
    if kind == "k2":
        return 0.5 * log_ratio_T**2
    # beyond the bound the exponential goes on as a straight line: a clamp's gradient would push away from the reference
    beyond_T = (-log_ratio_T - MAX_LOG_RATIO).clamp(min=0.0)
    return bounded_exp(-log_ratio_T) + math.exp(MAX_LOG_RATIO) * beyond_T + log_ratio_T - 1


def token_kl(inputs: LossInputs, kind: Literal["k1", "k2", "k3"]) -> Tensor | None:
    if inputs.reference_logprobs_T is None:
        return None
    return kl_estimate(inputs.masked(inputs.current_logprobs_T), inputs.masked(inputs.reference_logprobs_T), kind)


def kl_loss(kl_T: Tensor, inputs: LossInputs, config: LossConfig, denominators: Denominators) -> Tensor:
    """beta KL of Eq. 7. It stands outside the weighted sum: w~ never multiplies it, no token mask selects it."""
    mask_T = inputs.response_mask_T
    if config.kl_scope == "original":
        mask_T = mask_T & ~inputs.to_tokens(inputs.purified_S)
    kl_T = torch.where(mask_T, kl_T, torch.zeros_like(kl_T))
    split = config.entropy_split
    if split is not None and split.high_kl_coef is not None:  # Archer: two KLs, each over its own tokens
        assert inputs.high_entropy_T is not None
        high = (kl_T * inputs.high_entropy_T).sum() / max(denominators.high_kl_tokens, 1.0)
        low = (kl_T * ~inputs.high_entropy_T).sum() / max(denominators.low_kl_tokens, 1.0)
        return split.high_kl_coef * high + config.kl_coef * low
    if config.aggregation == "token_mean":
        return config.kl_coef * kl_T.sum() / max(denominators.kl_tokens, 1.0)
    if config.aggregation == "sequence_mean":
        kl_T = kl_T / inputs.to_tokens(inputs.response_lengths_S.clamp(min=1))
    # under `sum` a sequence's KL is the sum of its tokens', and Eq. 7's KL is its expectation
    return config.kl_coef * kl_T.sum() / max(denominators.kl_sequences, 1.0)
