"""Advantages and weights of one rebuilt group (LENS Eq. 4 and 6, GRPO, leave-one-out), and DAPO's length penalty.

Shape suffix: M members of one group, in any order (originals that stayed, then purified successes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_megatron.algorithms.outcomes import SAME_REWARD, LearnsFrom
from lens_megatron.own_functions import named


@dataclass(frozen=True)
class OverlongConfig:
    """DAPO's soft length penalty: linear over the last `buffer_tokens` before the response limit."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    buffer_tokens: int = 4096
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer_tokens < 1:
            raise ValueError("overlong.buffer_tokens must be at least 1")
        if self.penalty < 0:
            raise ValueError("overlong.penalty must not be negative")


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards of a group become advantages and weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    baseline: str = "group"  # a name in BASELINES: group, leave_one_out, original; or module:function
    std: Literal["unbiased", "population", "none"] = "unbiased"
    epsilon: float = 1e-6  # added to the std
    # Eq. 4 on every group (Algorithm 1), on groups with a purified rollout, on purified rollouts alone, or nowhere
    weights: Literal["all", "rescued_only", "purified_only", "none"] = "none"
    overlong: OverlongConfig | None = None

    def __post_init__(self) -> None:
        try:
            named(self.baseline, BASELINES)
        except ValueError as error:
            raise ValueError(f"advantage.baseline {error}") from None
        if self.epsilon < 0:
            raise ValueError("advantage.epsilon must not be negative")
        if self.baseline == "original" and self.std != "none":
            raise ValueError(
                "advantage.baseline 'original' has no std to divide by (the group's mixes x and x'): set std: none"
            )

    @property
    def learns_from(self) -> LearnsFrom:
        """A baseline that is no mean of the group may be anything; but where rewards do not differ no std divides by."""
        if self.baseline == "original":
            return "original"
        return "spread" if self.baseline in ("group", "leave_one_out") or self.std != "none" else "any"


class BaselineTerms(NamedTuple):
    rewards_M: Float[Tensor, " M"]
    weights_M: Float[Tensor, " M"]  # w~, not normalised
    original_mean: float  # mean of Y, the rollouts of the original prompt, with the same length penalty as rewards_M


def group_baseline(terms: BaselineTerms) -> Float[Tensor, " M"]:
    """The weighted mean of the group (Eq. 6; GRPO's mean when all weights are equal)."""
    return _weighted_mean(terms.rewards_M, terms.weights_M).expand_as(terms.rewards_M)


def leave_one_out_baseline(terms: BaselineTerms) -> Float[Tensor, " M"]:
    """For each member the weighted mean of the others (RLOO)."""
    weighted_M = terms.weights_M * terms.rewards_M
    others_M = terms.weights_M.sum() - terms.weights_M
    return (weighted_M.sum() - weighted_M) / others_M.clamp(min=torch.finfo(torch.float64).tiny)


def original_baseline(terms: BaselineTerms) -> Float[Tensor, " M"]:
    """The mean of Y: where it had no success, failures stay at 0 and only the purified successes move the policy."""
    return torch.full_like(terms.rewards_M, terms.original_mean)


BASELINES: dict[str, Callable[[BaselineTerms], Tensor]] = {
    "group": group_baseline,
    "leave_one_out": leave_one_out_baseline,
    "original": original_baseline,
}


class GroupAdvantages(NamedTuple):
    advantages_M: Float[Tensor, " M"]
    weights_M: Float[Tensor, " M"]  # w~ of Eq. 4: multiplies the policy loss of the sample, never its KL


def group_weights(
    success_M: Bool[Tensor, " M"],
    purified_M: Bool[Tensor, " M"],
    success_rate: float,
    which: Literal["all", "rescued_only", "purified_only", "none"],
) -> Float[Tensor, " M"]:
    """w~ of Eq. 4: `success_rate` (a, of Y) for successes of x, 1 - a for purified ones and failures."""
    ones_M = torch.ones(len(success_M), dtype=torch.float64, device=success_M.device)
    if which == "none" or (which == "rescued_only" and not bool(purified_M.any())):
        return ones_M
    if which == "purified_only":
        return torch.where(purified_M, 1.0 - success_rate, ones_M)
    return torch.where(success_M & ~purified_M, success_rate, 1.0 - success_rate).to(torch.float64)


def group_advantages(
    rewards_M: Float[Tensor, " M"],
    success_M: Bool[Tensor, " M"],
    purified_M: Bool[Tensor, " M"],
    success_rate: float,
    config: AdvantageConfig,
    original_mean: float | None = None,
) -> GroupAdvantages:
    """Eq. 6 on one rebuilt group.

    `success_rate` is a of Eq. 4: the share of successes among the original rollouts Y, before anything was replaced.
    `original_mean` is the mean of Y's rewards, shaped as `rewards_M` are; it differs from a when they are graded or shaped.

    Computed in float64: in float32 a weighted mean near 1 is off by 6e-8, which the division by a small std + 1e-6 would
    blow up to an advantage of 0.06 for equal rewards.
    """
    rewards = rewards_M.to(torch.float64)
    weights = group_weights(success_M, purified_M, success_rate, config.weights)
    if config.learns_from == "spread" and bool(rewards.max() - rewards.min() <= SAME_REWARD):
        # no spread, no signal: exactly 0, whatever the rounding and the epsilon
        return GroupAdvantages(torch.zeros_like(rewards_M), weights.to(rewards_M.dtype))
    terms = BaselineTerms(rewards, weights, success_rate if original_mean is None else original_mean)
    advantages = rewards - named(config.baseline, BASELINES)(terms)
    if config.std != "none":
        advantages = advantages / (_weighted_std(rewards, weights, unbiased=config.std == "unbiased") + config.epsilon)
    return GroupAdvantages(advantages.to(rewards_M.dtype), weights.to(rewards_M.dtype))


def overlong_penalty(
    lengths_M: Int[Tensor, " M"], max_response_tokens: int, config: OverlongConfig
) -> Float[Tensor, " M"]:
    """What to add to the rewards: 0 up to the buffer, then linearly down to -penalty at the limit (DAPO Eq. 13).

    Shapes the reward the advantage sees. Success, and every filter or rescue that asks for it, keep the verifier's.
    """
    beyond_M = lengths_M - (max_response_tokens - config.buffer_tokens)
    return -config.penalty * (beyond_M / config.buffer_tokens).clamp(min=0.0, max=1.0)


def _weighted_mean(values_M: Tensor, weights_M: Tensor) -> Tensor:
    return (weights_M * values_M).sum() / weights_M.sum()


def _weighted_std(values_M: Tensor, weights_M: Tensor, unbiased: bool) -> Tensor:
    """Population std under normalised weights; unbiased divides by 1 - sum w^2, (m - 1) / m for equal weights."""
    shares_M = weights_M / weights_M.sum()
    variance = (shares_M * (values_M - (shares_M * values_M).sum()) ** 2).sum()
    if unbiased:
        variance = variance / (1.0 - (shares_M**2).sum()).clamp(min=torch.finfo(torch.float64).eps)
    return variance.sqrt()
