"""Packed causal attention in plain torch, for the local layer spec, with context parallelism.

Megatron-Core's own DotProductAttention refuses packed sequences and context parallelism. Here a pack is a row of sequences
laid end to end. On CUDA the whole pack goes through torch's variable-length flash attention; on CPU, and in fp32, each
sequence goes through scaled_dot_product_attention by itself, so that no [pack, pack] mask is built.

Context parallelism: each rank holds chunk r and chunk 2n-1-r of every sequence (so that causal work is even). Keys and
values are all-gathered over the context-parallel ranks; their gradients are summed back to the owner. A chunk sees the
keys from its sequence's start to its own end, so that a causal mask aligned to the last query and the last key is right:
flash attention's own. With a mask of its own SDPA would fall back, for grouped heads on CUDA, to holding all scores.

Shapes: T tokens of this rank, K tokens of the whole pack, N query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
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


@dataclass(frozen=True)
class Pieces:
    """What a context-parallel rank attends with: its chunks' queries, each with the keys that it sees."""

    keys_K: Tensor  # of the gathered keys, in the order of the chunks; a key is there for every chunk that sees it
    q_lengths: list[int]
    k_lengths: list[int]
    cu_q: Tensor
    cu_k: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """What Megatron-Core hands through the layers of a forward pass; and what is worked out in the first for all of them."""

    lengths: tuple[int, ...] = ()  # of the whole pack's sequences, known here: a layer would have to ask the GPU
    cp_rank: int = 0
    cp_ranks: int = 1

    @cached_property
    def pieces(self) -> Pieces:
        """Transformer Engine's layers do not ask for it."""
        where = self.cu_seqlens_q.device
        gathered_K = torch.cat([local_positions(self.lengths, self.cp_ranks, rank) for rank in range(self.cp_ranks)])
        seen, q_lengths = seen_by_chunks(self.lengths, self.cp_ranks, self.cp_rank)
        k_lengths = [len(positions) for positions in seen]
        keys_K = torch.argsort(gathered_K)[torch.cat(seen)].to(where)
        return Pieces(keys_K, q_lengths, k_lengths, _cumulative(q_lengths, where), _cumulative(k_lengths, where))


def packed_sequences(lengths: Sequence[int], cp_rank: int, cp_ranks: int, device: torch.device) -> PackedSequences:
    cu, longest = _cumulative(lengths, device), max(lengths)
    # Transformer Engine compares the two by a look at the GPU's values, in every layer; its context parallelism wants both
    padded = cu if cp_ranks > 1 else None
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu,
        cu_seqlens_kv=cu,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        cp_rank=cp_rank,
        cp_ranks=cp_ranks,
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


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
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            raise ValueError("every sequence goes through packing: packed_seq_params is missing")
        query_TND, key_TGD, value_TGD = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
        on_flash = query_TND.is_cuda and query_TND.dtype != torch.float32  # flash attention is for half precision
        if self.cp_group.size() > 1:
            output_TND = self._over_context_ranks(query_TND, key_TGD, value_TGD, packed_seq_params.pieces, on_flash)
        elif on_flash:
            cu, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            output_TND = _flash(query_TND, key_TGD, value_TGD, cu, cu, longest, longest, self.scale)
        else:
            lengths = list(packed_seq_params.lengths)
            output_TND = _one_by_one(query_TND, key_TGD, value_TGD, lengths, lengths, self.scale)
        return output_TND.reshape(output_TND.size(0), -1)

    def _over_context_ranks(
        self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, pieces: Pieces, on_flash: bool
    ) -> Tensor:
        k_KGD, v_KGD = (_GatherOverRanks.apply(x, self.cp_group)[pieces.keys_K] for x in (k_TGD, v_TGD))
        q_lengths, k_lengths = pieces.q_lengths, pieces.k_lengths
        if not on_flash:
            return _one_by_one(q_TND, k_KGD, v_KGD, q_lengths, k_lengths, self.scale)
        return _flash(q_TND, k_KGD, v_KGD, pieces.cu_q, pieces.cu_k, max(q_lengths), max(k_lengths), self.scale)


def seen_by_chunks(lengths: Sequence[int], ranks: int, rank: int) -> tuple[list[Tensor], list[int]]:
    """For each chunk that a rank holds, in its order: the places in the pack of the keys it sees, and its queries."""
    seen: list[Tensor] = []
    queries: list[int] = []
    start = 0
    for length in lengths:
        chunk = length // (2 * ranks)
        for number in (rank, 2 * ranks - 1 - rank):
            seen.append(torch.arange(start, start + (number + 1) * chunk))
            queries.append(chunk)
        start += length
    return seen, queries


def _one_by_one(
    q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, q_lengths: list[int], k_lengths: list[int], scale: float
) -> Tensor:
    parts = zip(q_TND.split(q_lengths), k_KGD.split(k_lengths), v_KGD.split(k_lengths), strict=True)
    return torch.cat([_attend(q, k, v, scale) for q, k, v in parts])


def _flash(
    q_TND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> Tensor:
    """Causal, aligned to each piece's last query and last key."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # torch 2.10 to 2.13 differ in these keywords
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    options.update({"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True})
    if not options.get("scale") and not math.isclose(scale, q_TND.size(-1) ** -0.5):
        raise RuntimeError("this torch's varlen_attn takes no scale: torch >= 2.11 is needed")
    repeats = q_TND.size(1) // k_KGD.size(1)
    if repeats > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    elif repeats > 1:
        k_KGD, v_KGD = (x.repeat_interleave(repeats, dim=1) for x in (k_KGD, v_KGD))
    return varlen_attn(q_TND, k_KGD, v_KGD, cu_q, cu_k, longest_q, longest_k, **options)  # type: ignore[return-value]


def _attend(q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, scale: float) -> Tensor:
    """One piece; causal, aligned to its last query and last key."""
    queries, keys = len(q_TND), len(k_KGD)
    visible_TK = None
    if queries != keys:
        visible_TK = torch.ones(queries, keys, dtype=torch.bool, device=q_TND.device).tril(keys - queries)
    if q_TND.is_cuda:  # in fp32: only flash attention would take grouped heads there, all else holds all scores
        k_KGD, v_KGD = (x.repeat_interleave(q_TND.size(1) // k_KGD.size(1), dim=1) for x in (k_KGD, v_KGD))
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
