"""Token log-probs and entropies straight from hidden states: no [tokens, vocabulary] tensor is ever built.

    log p(label)   = z_label - max - log sum            z = hidden . weight / temperature
    entropy        = log sum - E[z - max]
    d log p / dz_j = [j = label] - p_j
    d entropy/dz_j = -p_j (log p_j + entropy)

Each tensor-parallel rank walks its own rows of the vocabulary in tiles, forward and backward, each tile's logits living
only while it is visited; here maxima, sums and moments are combined over the ranks. What walks is one of two:
head_triton.py (fused kernels, CUDA; unmeasured on a GPU) or head_chunked.py (plain torch, anywhere).

Shapes: T tokens, H hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore import head_chunked
from lens_megatron.mcore.settings import HeadKind


def token_logprobs_and_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropy: bool = True,
    kind: HeadKind = "torch",
) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy of every token, fp32, equal on every rank of `group`; NaN for entropies not asked for.

    `weight_VH` holds rows [vocab_start, vocab_start + V) of the vocabulary; rows from `vocab_size` on are padding and
    have no probability. The gradient of `hidden_TH` is this rank's part: the caller's gather sums it over the ranks.
    """
    rows = weight_VH.size(0) if vocab_size is None else max(0, min(weight_VH.size(0), vocab_size - vocab_start))
    if group is not None and group.size() == 1:
        group = None
    walk = choose_walk(kind, hidden_TH)
    return _Head.apply(hidden_TH, weight_VH, labels_T, temperature, vocab_start, rows, group, entropy, walk)


def choose_walk(kind: HeadKind, hidden_TH: Tensor) -> ModuleType:
    """head_triton or head_chunked, which offer the same `statistics` and `gradients`."""
    if kind == "torch":
        return head_chunked
    if not triton_available() or hidden_TH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise RuntimeError(
            f"memory.head: triton cannot work here ({hidden_TH.dtype}): install triton, or set it to torch"
        )
    from lens_megatron.mcore import head_triton

    if not (hidden_TH.is_cuda or head_triton.interpreted()):
        raise RuntimeError("memory.head: triton needs a GPU (or TRITON_INTERPRET=1, to test): set it to torch")
    return head_triton


def triton_available() -> bool:
    return importlib.util.find_spec("triton") is not None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        temperature: float,
        vocab_start: int,
        rows: int,
        group: dist.ProcessGroup | None,
        entropy: bool,
        walk: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        local_label_T = labels_T - vocab_start
        max_T, sum_T, moment_T, label_T = walk.statistics(
            hidden_TH, weight_VH[:rows], local_label_T, temperature, entropy
        )
        if group is not None:
            global_max_T = max_T.clone()
            dist.all_reduce(global_max_T, op=dist.ReduceOp.MAX, group=group)
            sum_T, moment_T = head_chunked.shifted(sum_T, moment_T, max_T, global_max_T)
            max_T = global_max_T
            stacked = torch.stack([sum_T, moment_T, label_T])
            dist.all_reduce(stacked, group=group)
            sum_T, moment_T, label_T = stacked.unbind()
        log_sum_T = sum_T.log()
        entropy_T = log_sum_T - moment_T / sum_T if entropy else torch.full_like(sum_T, torch.nan)
        if not entropy:
            ctx.mark_non_differentiable(entropy_T)
        ctx.save_for_backward(hidden_TH, weight_VH, local_label_T, max_T + log_sum_T, entropy_T if entropy else None)
        ctx.temperature, ctx.rows, ctx.walk = temperature, rows, walk
        return label_T - max_T - log_sum_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_logprob_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, local_label_T, log_total_T, entropy_T = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight_VH = torch.empty_like(weight_VH) if need_weight else None
        if grad_weight_VH is not None:
            grad_weight_VH[ctx.rows :].zero_()  # padding
        if entropy_T is None:
            entropy_T = torch.zeros_like(log_total_T)
            grad_entropy_T = entropy_T
        ctx.walk.gradients(
            hidden_TH,
            weight_VH[: ctx.rows],
            local_label_T,
            log_total_T,
            entropy_T,
            grad_logprob_T,
            grad_entropy_T,
            ctx.temperature,
            grad_hidden_TH,
            grad_weight_VH[: ctx.rows] if grad_weight_VH is not None else None,
        )
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None, None, None
