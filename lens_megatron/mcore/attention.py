"""Packed causal attention in plain torch, for the local layer spec, with context parallelism.

Megatron-Core's own DotProductAttention refuses packed sequences and context parallelism. Here a pack is a row of sequences
laid end to end. On CUDA the whole pack goes through torch's variable-length flash attention; on CPU, and with context
parallelism, each sequence goes through scaled_dot_product_attention by itself, so that no [pack, pack] mask is built.

Context parallelism: each rank holds chunk r and chunk 2n-1-r of every sequence (so that causal work is even). Keys and
values are all-gathered over the context-parallel ranks; their gradients are summed back to the owner.

Shapes: T tokens of this rank, K tokens of the whole pack, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lens_megatron.mcore.packing import local_positions


class _GatherOverRanks(torch.autograd.Function):
    """All-gather along dim 0; backward sums every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()].clone(), None


class PackedAttention(MegatronModule):
    """core_attention of the local spec. Takes the arguments Megatron-Core gives to any core attention."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError("attention dropout is not supported: reinforcement learning scores what it trains")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            raise ValueError("every sequence goes through packing: packed_seq_params is missing")
        query_TND, key_TGD, value_TGD = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        if self.cp_group.size() > 1:
            output_TND = self._over_context_ranks(query_TND, key_TGD, value_TGD, packed_seq_params)
        elif query_TND.is_cuda and query_TND.dtype != torch.float32:  # flash attention is for half precision
            output_TND = self._flash(query_TND, key_TGD, value_TGD, packed_seq_params)
        else:
            output_TND = self._one_by_one(query_TND, key_TGD, value_TGD, packed_seq_params)
        return output_TND.reshape(output_TND.size(0), -1)

    def _one_by_one(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
        lengths = _lengths(packed)
        outputs = [
            _attend(q, k, v, self.scale, None)
            for q, k, v in zip(q_TND.split(lengths), k_TGD.split(lengths), v_TGD.split(lengths), strict=True)
        ]
        return torch.cat(outputs)

    def _flash(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters  # torch 2.10 to 2.13 differ in these keywords
        options: dict[str, Any] = {"scale": self.scale} if "scale" in known else {}
        options.update({"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True})
        if not options.get("scale") and not math.isclose(self.scale, q_TND.size(-1) ** -0.5):
            raise RuntimeError("this torch's varlen_attn takes no scale: torch >= 2.11 is needed")
        repeats = q_TND.size(1) // k_TGD.size(1)
        if repeats > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif repeats > 1:
            k_TGD, v_TGD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
        cu, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        return varlen_attn(q_TND, k_TGD, v_TGD, cu, cu, longest, longest, **options)  # type: ignore[return-value]

    def _over_context_ranks(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        lengths = _lengths(packed)
        held = torch.cat([local_positions(lengths, ranks, r) for r in range(ranks)]).to(q_TND.device)
        in_order = torch.argsort(held)
        k_KGD, v_KGD = (_GatherOverRanks.apply(x, self.cp_group)[in_order] for x in (k_TGD, v_TGD))
        mine = local_positions(lengths, ranks, rank).to(q_TND.device)
        outputs, start_T, start_K = [], 0, 0
        for length in lengths:
            q = q_TND[start_T : start_T + length // ranks]
            k, v = k_KGD[start_K : start_K + length], v_KGD[start_K : start_K + length]
            q_position = mine[start_T : start_T + length // ranks] - start_K
            visible = q_position[:, None] >= torch.arange(length, device=q.device)[None, :]
            outputs.append(_attend(q, k, v, self.scale, visible))
            start_T, start_K = start_T + length // ranks, start_K + length
        return torch.cat(outputs)


def _lengths(packed: PackedSeqParams) -> list[int]:
    cu: Tensor = packed.cu_seqlens_q
    return (cu[1:] - cu[:-1]).tolist()


def _attend(q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, scale: float, visible_TK: Tensor | None) -> Tensor:
    """One sequence; causal when no mask is given."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TND, k_KGD, v_KGD))
    output = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible_TK,
        is_causal=visible_TK is None,
        scale=scale,
        enable_gqa=q_TND.size(1) != k_KGD.size(1),
    )
    return output.squeeze(0).transpose(0, 1)
