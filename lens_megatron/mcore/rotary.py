"""Rotary embeddings of a pack by each token's own position, for the local layer spec.

Megatron-Core cuts a pack into its sequences in every layer, for queries and for keys, and asks the GPU for their lengths
each time: the host waits twice a layer. Here cosines and sines are gathered once a pack, and a layer only turns. On CUDA
that is one kernel, made by torch.compile like Megatron-Core's SwiGLU, instead of seven that each read and write all heads.

Shapes: P positions, T tokens of this rank's pack, N heads, D head size, R = D / 2 pairs (i, i + R) that turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.transformer import attention
from torch import Tensor

_of_megatron = attention.apply_rotary_pos_emb


def gathered(angles_P11D: Tensor, position_ids_1T: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, T, 1, R]: cosines and sines of the pack's tokens, taken in fp32. Megatron-Core gives each pair's angle twice."""
    angles_T1R = angles_P11D.squeeze(1).chunk(2, dim=-1)[0][position_ids_1T.squeeze(0)]
    return torch.stack([angles_T1R.cos(), angles_T1R.sin()]).to(dtype)


def turned(x_TND: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
    first_TNR, second_TNR = x_TND.chunk(2, dim=-1)
    return torch.cat((first_TNR * cos_T1R - second_TNR * sin_T1R, second_TNR * cos_T1R + first_TNR * sin_T1R), dim=-1)


@cache
def _one_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(turned, dynamic=True)  # packs differ in tokens


class _Turn(torch.autograd.Function):
    """The gradient turns back: nothing of x need be kept."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_sin_2T1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sin_2T1R)
        return _Turn._apply(x_TND, *cos_sin_2T1R)

    @staticmethod
    def backward(ctx: Any, gradient_TND: Tensor) -> tuple[Tensor, None]:
        (cos_sin_2T1R,) = ctx.saved_tensors
        cos_T1R, sin_T1R = cos_sin_2T1R
        return _Turn._apply(gradient_TND, cos_T1R, -sin_T1R), None

    @staticmethod
    def _apply(x_TND: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> Tensor:
        return (_one_kernel() if x_TND.is_cuda else turned)(x_TND, cos_T1R, sin_T1R)


def apply_gathered(
    x_TND: Tensor,
    cos_sin_2T1R: Tensor,
    config: Any,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Stands where Megatron-Core's attention looks up apply_rotary_pos_emb; what is not a gathered pack goes there."""
    if cu_seqlens is None or config.apply_rope_fusion:
        return _of_megatron(x_TND, cos_sin_2T1R, config, cu_seqlens, mscale, cp_group)
    return _Turn.apply(x_TND, cos_sin_2T1R)


def install() -> None:
    """Megatron-Core's attention has no slot for it."""
    attention.apply_rotary_pos_emb = apply_gathered
