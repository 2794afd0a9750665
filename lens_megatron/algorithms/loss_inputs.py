"""What the loss of one micro-batch is computed from, and the denominators of the mini-batch it belongs to.

Shape suffixes: T tokens of a packed micro-batch (padding and prompt tokens included, masked out), S its samples.

Denominators are counted once over the whole mini-batch, before it is cut into micro-batches and spread over ranks. So
every returned loss is a plain share of the global one: their sum over micro-batches and ranks is exactly the loss of
the mini-batch. No average over a micro-batch is taken anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_megatron.algorithms.loss_config import LossConfig, required_inputs


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch, or this rank's part of it under context parallelism.

    A micro-batch that only fills up a rank's schedule holds one sample of length 0 and no response token.
    """

    current_logprobs_T: Float[Tensor, " T"]  # log pi_theta(y|x), requires grad
    entropy_T: Float[Tensor, " T"]  # of the current model under x; needs a gradient only for an entropy bonus
    proximal_logprobs_T: Float[Tensor, " T"]  # log pi_old(y|x_roll): under x' for purified rollouts (Eq. 5)
    response_mask_T: Bool[Tensor, " T"]
    sample_T: Int[Tensor, " T"]  # index into the samples; of a padding token: any valid index
    advantages_S: Float[Tensor, " S"]
    weights_S: Float[Tensor, " S"]
    purified_S: Bool[Tensor, " S"]
    response_lengths_S: Int[Tensor, " S"]  # of the whole response, also when this rank holds a part of it
    behaviour_logprobs_T: Float[Tensor, " T"] | None = None  # the engine's, as sampled, under x_roll
    reference_logprobs_T: Float[Tensor, " T"] | None = None  # under x
    proximal_original_logprobs_T: Float[Tensor, " T"] | None = None  # log pi_old(y|x) of every rollout
    proximal_purified_logprobs_T: Float[Tensor, " T"] | None = None  # log pi_old(y|x'); where there is no x': under x
    high_entropy_T: Bool[Tensor, " T"] | None = None  # from token_masks, computed before micro-batching
    trusted_T: Bool[Tensor, " T"] | None = None  # False: left out of the policy term, as too far from the engine's
    # Sums a token vector per sample, differentiably. Under context parallelism it all-reduces over the ranks that share
    # the sequences, in the backward pass too: a rank's token moves the sequence ratio that the other ranks use.
    sum_over_sample: Callable[[Tensor], Tensor] | None = None

    @property
    def samples(self) -> int:
        return len(self.advantages_S)

    def to_tokens(self, value_S: Tensor) -> Tensor:
        """A value per sample, repeated for each of its tokens."""
        return value_S[self.sample_T]

    def per_sample(self, value_T: Tensor) -> Tensor:
        """The sum of a token value over each whole sample; masked tokens must already be 0."""
        if self.sum_over_sample is not None:
            return self.sum_over_sample(value_T)
        return value_T.new_zeros(self.samples).index_add(0, self.sample_T, value_T)

    def masked(self, value_T: Tensor) -> Tensor:
        """0 where there is no response token, so that padding can hold anything, NaN included."""
        return torch.where(self.response_mask_T, value_T, torch.zeros_like(value_T))

    def check(self, config: LossConfig) -> None:
        missing = sorted(name for name in required_inputs(config) if getattr(self, name) is None)
        if missing:
            raise ValueError(f"this loss needs {', '.join(missing)}, which the trainer did not compute")


@dataclass(frozen=True)
class Denominators:
    """Counts over the global mini-batch, which every rank holds whole."""

    groups: float
    sequences: float
    tokens: float  # response tokens
    policy_tokens: float  # what a token mean of the policy term divides by
    kl_sequences: float  # within loss.kl_scope, as the next three
    kl_tokens: float
    high_kl_tokens: float
    low_kl_tokens: float
    purified_tokens: float


def count_denominators(
    config: LossConfig,
    response_lengths: Sequence[int],
    purified: Sequence[bool],
    groups: int,
    high_entropy: Sequence[Tensor] | None = None,
) -> Denominators:
    """Counts of a whole mini-batch: each sample's response length, whether it is purified, and the number of prompts.

    `high_entropy` holds one bool vector a sample, as long as its response (token_masks.high_entropy_masks).
    """
    split = config.entropy_split
    if (split is None) != (high_entropy is None):
        raise ValueError("entropy masks are needed exactly when loss.entropy_split is set")
    high = [0] * len(response_lengths) if high_entropy is None else [int(mask.sum()) for mask in high_entropy]
    in_kl = [config.kl_scope == "all" or not is_purified for is_purified in purified]
    tokens = sum(response_lengths)
    policy_tokens = tokens
    if split is not None and split.denominator == "selected" and split.train_on != "all":
        policy_tokens = sum(high) if split.train_on == "high" else tokens - sum(high)
    kl_tokens = sum(length for length, inside in zip(response_lengths, in_kl, strict=True) if inside)
    high_kl_tokens = sum(count for count, inside in zip(high, in_kl, strict=True) if inside)
    return Denominators(
        groups=float(groups),
        sequences=float(len(response_lengths)),
        tokens=float(tokens),
        policy_tokens=float(policy_tokens),
        kl_sequences=float(sum(in_kl)),
        kl_tokens=float(kl_tokens),
        high_kl_tokens=float(high_kl_tokens),
        low_kl_tokens=float(kl_tokens - high_kl_tokens),
        purified_tokens=float(sum(length for length, is_p in zip(response_lengths, purified, strict=True) if is_p)),
    )
