"""Log-probs and entropies of whole sequences, from any layout: for prompt scores, old and reference log-probs alike.

Shapes: F places of the flat vector (batch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.mcore.batch import PackedBatch, flat_offsets
from lens_megatron.mcore.pipeline import forward_only, plan_for_this_layout
from lens_megatron.mcore.runtime import device


@dataclass(frozen=True)
class TokenScores:
    """One entry a sequence, one value a token, on every rank. NaN: a first token's, and entropies not asked for."""

    logprobs: list[Tensor]
    entropies: list[Tensor]


def score_sequences(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    sequences: Sequence[Tensor],
    *,
    tokens_per_microbatch: int,
    temperature: float = 1.0,
    entropy: bool = True,
) -> TokenScores:
    """log p(token | tokens before it) and, unless told not to, the entropy of the distribution it was drawn from."""
    packs = plan_for_this_layout([len(sequence) for sequence in sequences], tokens_per_microbatch, config)
    offsets = flat_offsets(sequences)
    flat_2F = torch.zeros(2, offsets[-1] + 1, device=device())  # one place more, for what belongs nowhere

    def collect(output_2T: Tensor, batch: PackedBatch) -> None:  # a GPU is not waited for
        place_T = torch.where(batch.target_T >= 0, batch.target_T, offsets[-1])
        flat_2F.index_copy_(1, place_T, output_2T.float())

    forward_only(chunks, config, packs, sequences, temperature, collect, entropy)
    flat_2F = share_from_last_stage(flat_2F[:, :-1].contiguous())
    starts = torch.tensor(offsets[:-1], dtype=torch.long)
    flat_2F[:, starts] = torch.nan
    lengths = [len(sequence) for sequence in sequences]
    return TokenScores(list(flat_2F[0].split(lengths)), list(flat_2F[1].split(lengths)))


def share_from_last_stage(values: Tensor) -> Tensor:
    return share_from_stage(values, parallel_state.get_pipeline_model_parallel_last_rank())


def share_from_stage(values: Tensor, source: int) -> Tensor:
    """Sum over data- and context-parallel ranks of the stage that `source` is in, then known to all ranks. On the CPU."""
    values = values.to(device())
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(values, src=source, group=group)
    return values.cpu()
