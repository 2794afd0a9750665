"""Interference scores (Eq. 1): how far the policy has moved from the reference on each token of a prompt.

Shapes: T tokens of one prompt. Entry t of a log-prob vector is log pi(token t | tokens before t); entry 0 has no
conditional and is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def interference_scores(
    policy_logprobs_T: Float[Tensor, " T"], reference_logprobs_T: Float[Tensor, " T"]
) -> Float64[Tensor, " T"]:
    """S_I = |log pi_theta - log pi_ref| for every token; NaN for the first.

    Both sides must come from the same dtype and layout, or the score measures the layouts.
    """
    # double: the difference of two float32 numbers is then exact, and so is its comparison with the noise floor
    scores_T = (policy_logprobs_T.double() - reference_logprobs_T.double()).abs()
    if len(scores_T) > 0:
        scores_T[0] = torch.nan
    return scores_T


def from_optional(values: Sequence[float | None]) -> Float64[Tensor, " T"]:
    """A JSON or engine row, null where there is no value, as a vector with NaN there."""
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


def to_optional(values_T: Float[Tensor, " T"]) -> list[float | None]:
    """The reverse, for JSON, which has no NaN."""
    return [None if value != value else float(value) for value in values_T.tolist()]
