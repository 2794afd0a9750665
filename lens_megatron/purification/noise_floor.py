"""How large a score can be when nothing has changed.

In bf16 the same weights give slightly different log-probs when a prompt is packed with other prompts or split over
other ranks. A score of that size says nothing about interference, and top k would still pick the largest of them.
So the floor is measured: the same weights, evaluated again in other packings, once per model, dtype and layout.

Shapes: E evaluations of one prompt, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def spread(logprobs_ET: Float[Tensor, "E T"]) -> Float64[Tensor, " T"]:
    """Largest minus smallest log-prob of each token over its evaluations; for two of them, |difference|."""
    if logprobs_ET.shape[0] < 2:
        raise ValueError("a noise floor needs at least two evaluations of the same weights")
    evaluations_ET = logprobs_ET.double()
    return evaluations_ET.amax(dim=0) - evaluations_ET.amin(dim=0)


def measured_noise_floor(prompts: Sequence[Float[Tensor, "_ _"]], quantile: float = 1.0) -> float:
    """The floor for scores of this model and layout, from evaluations [E, T] of several prompts.

    Under "nothing changed", a score is one more draw of exactly this spread (both its sides are noisy), and top k
    picks the largest draws of a prompt. The statistic must therefore bound the tail and not the middle: the default
    is the maximum over all measured tokens. Measured on N tokens, a fresh noise score exceeds it with probability
    1/(N + 1); a quantile q < 1 lets through a share 1 - q of pure noise, all of which top k would choose. Its price:
    one outlier raises the floor. If most prompts come out tied although scores grow, measure on the tokens that are
    eligible only (pass their columns) or lower `noise_quantile` to, say, 0.999.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is above 0 and at most 1: got {quantile}")
    if not prompts:
        raise ValueError("no prompt to measure the noise floor on")
    spreads_N = torch.cat([spread(logprobs_ET) for logprobs_ET in prompts])
    spreads_N = spreads_N[~spreads_N.isnan()]  # the first token of each prompt
    if len(spreads_N) == 0:
        raise ValueError("no token to measure the noise floor on: every prompt has only its first")
    # an order statistic, never interpolated: half of the tokens at or below it means half
    rank = max(1, math.ceil(quantile * len(spreads_N)))
    return float(spreads_N.sort().values[rank - 1])
