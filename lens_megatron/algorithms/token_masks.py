"""Which response tokens are of high entropy, decided before micro-batching from one forward pass of the mini-batch.

The entropies are the current model's under x, detached, one vector of response tokens a sample (suffix T). A True in a
mask always means HIGH entropy: the public code of Archer has the name the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lens_megatron.algorithms.loss_config import EntropySplitConfig


def high_entropy_masks(entropies: Sequence[Tensor], split: EntropySplitConfig) -> list[Tensor]:
    """One bool mask a sample, True on its high-entropy tokens. `entropies` must be those of the whole mini-batch."""
    if split.scope == "batch":
        return top_share_masks(entropies, split.high_share)
    return [above_quantile_mask(entropy_T, 1.0 - split.high_share) for entropy_T in entropies]


def top_share_masks(entropies: Sequence[Tensor], share: float) -> list[Tensor]:
    """Exactly ceil(share x N) of all N tokens, those of highest entropy; among equals the earlier ones (80/20)."""
    if not entropies:
        return []
    lengths = [len(entropy_T) for entropy_T in entropies]
    every_T = torch.cat(list(entropies)).detach()
    # share x N in floats can land a hair above the integer it means (0.07 x 100), which must not select one more
    chosen = math.ceil(round(share * len(every_T), 6))
    mask_T = torch.zeros(len(every_T), dtype=torch.bool, device=every_T.device)
    mask_T[torch.argsort(every_T, descending=True, stable=True)[:chosen]] = True
    return list(mask_T.split(lengths))


def above_quantile_mask(entropy_T: Tensor, quantile: float) -> Tensor:
    """Tokens strictly above the response's own quantile, linearly interpolated (Archer)."""
    if len(entropy_T) == 0:
        return torch.zeros(0, dtype=torch.bool, device=entropy_T.device)
    values_T = entropy_T.detach().float() if entropy_T.dtype in (torch.bfloat16, torch.float16) else entropy_T.detach()
    return values_T > torch.quantile(values_T, quantile)
