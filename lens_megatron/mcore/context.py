"""Sums over whole sequences when each context-parallel rank holds only a part of every one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: a rank's token moves the sum that every rank's loss uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_sequences(values_T: Tensor, sequence_T: Tensor, sequences: int) -> Tensor:
    """[sequences]: the sum of each sequence's token values, over all ranks that hold parts of it."""
    local = values_T.new_zeros(sequences).index_add(0, sequence_T, values_T)
    group = parallel_state.get_context_parallel_group()
    return local if group.size() == 1 else _SumOverRanks.apply(local, group)
