"""Rotary embeddings of a pack by each token's own position, for the local layer spec.

Megatron-Core cuts a pack into its sequences in every layer, for queries and for keys, and asks the GPU for their lengths
each time: the host waits twice a layer. Here cosines and sines are gathered once a pack, and a layer only multiplies.

Shapes: P positions, T tokens of this rank's pack, N heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import attention
from torch import Tensor

_of_megatron = attention.apply_rotary_pos_emb


def gathered(angles_P11D: Tensor, position_ids_1T: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, T, 1, D]: cosines and sines of the pack's tokens, taken in fp32."""
    angles_T1D = angles_P11D.squeeze(1)[position_ids_1T.squeeze(0)]
    return torch.stack([angles_T1D.cos(), angles_T1D.sin()]).to(dtype)


def apply_gathered(
    x_TND: Tensor,
    cos_sin_2T1D: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Stands where Megatron-Core's attention looks up apply_rotary_pos_emb; what is not a gathered pack goes there."""
    if cu_seqlens is None or config.apply_rope_fusion:
        return _of_megatron(x_TND, cos_sin_2T1D, config, cu_seqlens, mscale, cp_group)
    cos_T1D, sin_T1D = cos_sin_2T1D
    first_TND, second_TND = x_TND.chunk(2, dim=-1)
    return x_TND * cos_T1D + torch.cat((-second_TND, first_TND), dim=-1) * sin_T1D


def install() -> None:
    """Megatron-Core's attention has no slot for it."""
    attention.apply_rotary_pos_emb = apply_gathered
