"""What a token's ratio and advantage become before they are averaged: PPO's clip, CISPO, ASPO, CRPO's variants for P.

Each value is to be maximised. A factor under a stop-gradient is called a weight. Shape suffix: T tokens, masked ones
with a finite log-ratio, log-prob and advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SurrogateTerms:
    """Per-token material of a surrogate; ratio and log-probs carry the gradient."""

    # pi_theta / pi_old at the loss's level, one value for all tokens of a sample if by sequence
    ratio_T: Float[Tensor, " T"]
    current_logprobs_T: Float[Tensor, " T"]
    advantages_T: Float[Tensor, " T"]
    clip_low_T: Float[Tensor, " T"]
    clip_high_T: Float[Tensor, " T"]
    dual_clip: float | None


class Surrogate(NamedTuple):
    value_T: Float[Tensor, " T"]
    clipped_low_T: Bool[Tensor, " T"]  # tokens that the lower or the upper bound changed
    clipped_high_T: Bool[Tensor, " T"]


def clip(terms: SurrogateTerms) -> Surrogate:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) (PPO, Eq. 7), and for A < 0 at least c A (dual clip)."""
    low_T, high_T = 1 - terms.clip_low_T, 1 + terms.clip_high_T
    value_T = torch.minimum(
        terms.ratio_T * terms.advantages_T, torch.clamp(terms.ratio_T, low_T, high_T) * terms.advantages_T
    )
    negative_T = terms.advantages_T < 0
    if terms.dual_clip is not None:
        value_T = torch.where(negative_T, torch.maximum(value_T, terms.dual_clip * terms.advantages_T), value_T)
    positive_T = terms.advantages_T > 0
    return Surrogate(value_T, negative_T & (terms.ratio_T < low_T), positive_T & (terms.ratio_T > high_T))


def cispo(terms: SurrogateTerms) -> Surrogate:
    """stop_gradient(clip(rho)) A log pi: the weight is clipped, no token loses its gradient (arXiv 2506.13585)."""
    low_T, high_T = 1 - terms.clip_low_T, 1 + terms.clip_high_T
    weight_T = torch.clamp(terms.ratio_T, low_T, high_T).detach()
    value_T = weight_T * terms.advantages_T * terms.current_logprobs_T
    return Surrogate(value_T, terms.ratio_T < low_T, terms.ratio_T > high_T)


def aspo(terms: SurrogateTerms) -> Surrogate:
    """For A > 0 the ratio is turned over (arXiv 2510.06062): stop_gradient(min(1 / rho, c)) A log pi.

    Which tokens are clipped is still decided by rho itself. Negative advantages keep PPO's clip and dual clip.
    """
    ppo = clip(terms)
    positive_T = terms.advantages_T > 0
    weight_T = 1 / terms.ratio_T.detach()
    if terms.dual_clip is not None:
        weight_T = weight_T.clamp(max=terms.dual_clip)
    weight_T = torch.where(ppo.clipped_high_T, torch.zeros_like(weight_T), weight_T)
    flipped_T = weight_T * terms.advantages_T * terms.current_logprobs_T
    return ppo._replace(value_T=torch.where(positive_T, flipped_T, ppo.value_T))


SURROGATES: dict[str, Callable[[SurrogateTerms], Surrogate]] = {"clip": clip, "cispo": cispo, "aspo": aspo}
# weigh each token's own log-prob, so that one ratio for a whole sequence has no meaning for them
TOKEN_ONLY = frozenset({"cispo", "aspo"})


def purified_value(kind: Literal["floor", "power", "luffy"], value: float, terms: SurrogateTerms) -> Tensor:
    """What replaces the clipped surrogate on purified rollouts.

    floor: stop_gradient(clip(rho, c, 1)) A log pi. A clamp inside the surrogate would cut the gradient of the very
    tokens it is meant to raise. power: stop_gradient(rho^alpha) A log pi. luffy: p / (p + gamma) A with
    p = pi_theta(y_t|x), which needs no pi_old (arXiv 2504.14945).
    """
    if kind == "luffy":
        # p / (p + gamma) = sigmoid(log p - log gamma), exact where p underflows
        return torch.sigmoid(terms.current_logprobs_T - math.log(value)) * terms.advantages_T
    ratio_T = terms.ratio_T.detach()
    weight_T = ratio_T.clamp(min=value, max=1.0) if kind == "floor" else ratio_T**value
    return weight_T * terms.advantages_T * terms.current_logprobs_T
