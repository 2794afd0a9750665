"""Metrics of the loss as sums that add up over micro-batches and ranks, and what they become in metrics.jsonl.

A sum's name ends in what it is: NAME/total (already a share of the global value), NAME/sum with NAME/count (a mean),
NAME/square_sum beside them (effective sample size), NAME/max. All are reduced by addition except /max.

Shape suffixes: T tokens, S samples. A value per sample enters spread over its tokens (1 / length each), so that context
parallel ranks, which hold parts of it, count it once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_megatron.algorithms.loss_config import LossConfig
from lens_megatron.algorithms.loss_inputs import LossInputs
from lens_megatron.algorithms.ratios import at_level, bounded_exp, engine_log_weight, literal_log_ratio


@dataclass(frozen=True)
class MetricTerms:
    """What policy_loss already worked out."""

    mask_T: Bool[Tensor, " T"]  # tokens that carry the policy gradient
    weighted_advantage_T: Float[Tensor, " T"]  # scale x weights x A
    clipped_low_T: Bool[Tensor, " T"]
    clipped_high_T: Bool[Tensor, " T"]
    kl_T: Float[Tensor, " T"] | None
    engine_weight_T: Float[Tensor, " T"] | None


def metric_sums(
    inputs: LossInputs, config: LossConfig, terms: MetricTerms, losses: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The losses, and statistics of ratios, clipping, KL, entropy and mismatch, purified rollouts apart."""
    sums = {f"{name}/total": value.detach() for name, value in losses.items()}
    response_T = inputs.response_mask_T
    purified_T = response_T & inputs.to_tokens(inputs.purified_S)
    original_T = response_T & ~purified_T

    # Eq. 5's ratio whatever the loss makes of it: rho_t << 1 on P is the first sign that the rescue teaches nothing
    token_log_T = literal_log_ratio(inputs).detach()
    rho_T = bounded_exp(token_log_T)
    level_T = bounded_exp(at_level(token_log_T, inputs, config.ratio))
    _mean(sums, "ratio_original", level_T, original_T)
    _mean(sums, "ratio_purified", level_T, purified_T)
    _mean(sums, "rho_purified_below_0.3", (rho_T < 0.3).to(rho_T.dtype), purified_T)
    _mean(sums, "rho_purified_above_1.2", (rho_T > 1.2).to(rho_T.dtype), purified_T)
    _effective_size(sums, "rho_purified_tokens", rho_T, purified_T)
    share_T = 1 / inputs.to_tokens(inputs.response_lengths_S.clamp(min=1)).to(rho_T.dtype)
    sequence_T = bounded_exp(at_level(token_log_T, inputs, "sequence"))
    _effective_size(sums, "rho_purified_sequences", sequence_T, purified_T, share_T)

    clipped_T = terms.clipped_low_T | terms.clipped_high_T
    for name, hit_T in (("", clipped_T), ("_low", terms.clipped_low_T), ("_high", terms.clipped_high_T)):
        _mean(sums, f"clip_fraction{name}", hit_T.to(rho_T.dtype), terms.mask_T)
    _mean(sums, "clip_fraction_purified", clipped_T.to(rho_T.dtype), terms.mask_T & purified_T)
    _mean(sums, "policy_token_share", terms.mask_T.to(rho_T.dtype), response_T)
    # a token mean breaks sum w~ A = 0: long failures then outweigh the rest
    sums["positive_mass/total"] = terms.weighted_advantage_T.clamp(min=0).sum()
    sums["negative_mass/total"] = terms.weighted_advantage_T.clamp(max=0).sum()

    entropy_T = inputs.entropy_T.detach()
    _mean(sums, "entropy", entropy_T, response_T)
    _mean(sums, "entropy_purified", entropy_T, purified_T)
    _mean(sums, "entropy_negative", entropy_T, original_T & (inputs.to_tokens(inputs.advantages_S) < 0))
    if inputs.high_entropy_T is not None:
        _mean(sums, "entropy_high", entropy_T, response_T & inputs.high_entropy_T)
        _mean(sums, "entropy_low", entropy_T, response_T & ~inputs.high_entropy_T)
    if terms.kl_T is not None:
        kl_T = terms.kl_T.detach()
        _mean(sums, "kl", kl_T, response_T)
        _mean(sums, "kl_purified", kl_T, purified_T)
        _mean(sums, "kl_original", kl_T, original_T)
    difference_T = engine_log_weight(inputs)
    if difference_T is not None:
        for name, mask_T in (("", response_T), ("_purified", purified_T), ("_original", original_T)):
            _mean(sums, f"logprob_diff{name}", difference_T.abs(), mask_T)
            sums[f"logprob_diff{name}/max"] = _zeroed(difference_T.abs(), mask_T).amax()
    if terms.engine_weight_T is not None:
        _mean(sums, "engine_weight", terms.engine_weight_T, response_T)
        _mean(sums, "engine_dropped", (terms.engine_weight_T == 0).to(rho_T.dtype), response_T)
    return sums


def finish_metrics(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All-reduced sums as metrics. A mean over nothing is nan: there were no purified rollouts, say."""
    values = {name: float(value) for name, value in sums.items()}
    metrics: dict[str, float] = {}
    for full_name, value in values.items():
        name, _, kind = full_name.rpartition("/")
        count = values.get(f"{name}/count", 0.0)
        if kind == "total":
            metrics[name] = value
        elif kind == "max":
            metrics[f"{name}_max"] = math.nan if values.get(f"{name}/count") == 0 else value
        elif kind == "sum" and f"{name}/square_sum" not in values:
            metrics[name] = value / count if count else math.nan
        elif kind == "square_sum":
            # (sum rho)^2 / (n sum rho^2): the share of the rollouts that still counts
            metrics[f"effective_size_{name}"] = (
                values[f"{name}/sum"] ** 2 / (count * value) if count * value else math.nan
            )
    return metrics


def _zeroed(value_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, value_T, torch.zeros_like(value_T))


def _mean(sums: dict[str, Tensor], name: str, value_T: Tensor, mask_T: Tensor) -> None:
    sums[f"{name}/sum"] = _zeroed(value_T, mask_T).sum()
    sums[f"{name}/count"] = mask_T.to(value_T.dtype).sum()


def _effective_size(
    sums: dict[str, Tensor], name: str, value_T: Tensor, mask_T: Tensor, share_T: Tensor | float = 1.0
) -> None:
    shares_T = _zeroed(torch.ones_like(value_T) * share_T, mask_T)
    sums[f"{name}/sum"] = (shares_T * value_T).sum()
    sums[f"{name}/square_sum"] = (shares_T * value_T**2).sum()
    sums[f"{name}/count"] = shares_T.sum()
