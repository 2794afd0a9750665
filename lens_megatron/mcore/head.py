"""Token log-probs and entropies straight from hidden states: no [tokens, vocabulary] tensor is ever built.

The vocabulary is walked in tiles, forward and backward; each tile's logits live only while the tile is visited. Each
tensor-parallel rank walks its own rows of the vocabulary; maxima, sums and entropies are combined over the ranks.

    log p(label)   = z_label - max - log sum            z = hidden . weight / temperature
    entropy        = log sum - E[z - max]
    d log p / dz_j = [j = label] - p_j
    d entropy/dz_j = -p_j (log p_j + entropy)

Shapes: T tokens, H hidden size, V rows of the vocabulary on this rank, C rows in one tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A tile takes about 1 % of the logits it stands for, but never so little that matrix products become slivers.
_TILE_SHARE, _TILE_LEAST, _ROWS_AT_ONCE = 100, 256, 2048


def token_logprobs_and_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy of every token, fp32, equal on every rank of `group`.

    `weight_VH` holds rows [vocab_start, vocab_start + V) of the vocabulary; rows from `vocab_size` on are padding and
    have no probability. The gradient of `hidden_TH` is this rank's part: the caller's gather sums it over the ranks.
    """
    rows = weight_VH.size(0) if vocab_size is None else max(0, min(weight_VH.size(0), vocab_size - vocab_start))
    if group is not None and group.size() == 1:
        group = None
    return _VocabularyWalk.apply(hidden_TH, weight_VH, labels_T, temperature, vocab_start, rows, group)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and result, whatever the inputs."""
    if a.dtype == torch.float32 or a.dtype == torch.float64:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a @ b, in fp32, without a second tensor of sum_'s size."""
    if a.dtype == sum_.dtype:
        sum_.addmm_(a, b)
        return
    for start in range(0, a.size(0), _ROWS_AT_ONCE):
        sum_[start : start + _ROWS_AT_ONCE] += _product(a[start : start + _ROWS_AT_ONCE], b)


def _tiles(rows: int) -> list[tuple[int, int]]:
    step = max(_TILE_LEAST, rows // _TILE_SHARE)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class _VocabularyWalk(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor]:
        work_dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        tokens = hidden_TH.size(0)
        max_T = hidden_TH.new_full((tokens,), -torch.inf, dtype=work_dtype)
        sum_T = torch.zeros_like(max_T)  # sum exp(z - max)
        moment_T = torch.zeros_like(max_T)  # sum exp(z - max) (z - max)
        label_T = torch.zeros_like(max_T)  # z of the label, on the rank that has it
        local_label_T = labels_T - vocab_start
        for start, stop in _tiles(rows):
            z_TC = _product(hidden_TH, weight_VH[start:stop].t())
            if temperature != 1.0:
                z_TC.div_(temperature)
            inside_T = (local_label_T >= start) & (local_label_T < stop)
            column_T = (local_label_T - start).clamp(0, stop - start - 1)
            label_T += torch.where(inside_T, z_TC.gather(1, column_T[:, None]).squeeze(1), 0.0)
            new_max_T = torch.maximum(max_T, z_TC.amax(dim=1))
            sum_T, moment_T = _shifted(sum_T, moment_T, max_T, new_max_T)
            max_T = new_max_T
            z_TC.sub_(max_T[:, None])
            p_TC = z_TC.exp()
            sum_T += p_TC.sum(dim=1)
            moment_T += p_TC.mul_(z_TC).sum(dim=1)
            del z_TC, p_TC  # or they would stand beside the next tile's
        if group is not None:
            global_max_T = max_T.clone()
            dist.all_reduce(global_max_T, op=dist.ReduceOp.MAX, group=group)
            sum_T, moment_T = _shifted(sum_T, moment_T, max_T, global_max_T)
            max_T = global_max_T
            stacked = torch.stack([sum_T, moment_T, label_T])
            dist.all_reduce(stacked, group=group)
            sum_T, moment_T, label_T = stacked.unbind()
        log_sum_T = sum_T.log()
        entropy_T = log_sum_T - moment_T / sum_T
        ctx.save_for_backward(hidden_TH, weight_VH, local_label_T, max_T + log_sum_T, entropy_T)
        ctx.temperature, ctx.rows = temperature, rows
        return label_T - max_T - log_sum_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_logprob_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, local_label_T, log_total_T, entropy_T = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=log_total_T.dtype) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH) if need_weight else None
        with_entropy = bool(grad_entropy_T.any())
        scale_T = grad_logprob_T / ctx.temperature
        entropy_scale_T = grad_entropy_T / ctx.temperature
        for start, stop in _tiles(ctx.rows):
            tile_CH = weight_VH[start:stop]
            logp_TC = _product(hidden_TH, tile_CH.t())
            if ctx.temperature != 1.0:
                logp_TC.div_(ctx.temperature)
            logp_TC.sub_(log_total_T[:, None])
            if with_entropy:
                grad_TC = logp_TC.exp()
                logp_TC.add_(entropy_T[:, None]).mul_(entropy_scale_T[:, None]).add_(scale_T[:, None])
                grad_TC.mul_(logp_TC.neg_())
            else:
                grad_TC = logp_TC.exp_().mul_(-scale_T[:, None])
            del logp_TC
            inside_T = (local_label_T >= start) & (local_label_T < stop)
            column_T = (local_label_T - start).clamp(0, stop - start - 1)
            grad_TC.scatter_add_(1, column_T[:, None], torch.where(inside_T, scale_T, 0.0)[:, None])
            grad_TC = grad_TC.to(hidden_TH.dtype)
            if grad_hidden_TH is not None:
                _add_product(grad_hidden_TH, grad_TC, tile_CH)
            if grad_weight_VH is not None:
                if grad_weight_VH.dtype == grad_TC.dtype:
                    torch.mm(grad_TC.t(), hidden_TH, out=grad_weight_VH[start:stop])
                else:
                    grad_weight_VH[start:stop] = _product(grad_TC.t(), hidden_TH)
            del grad_TC
        if grad_hidden_TH is not None:
            grad_hidden_TH = grad_hidden_TH.to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _shifted(sum_T: Tensor, moment_T: Tensor, old_max_T: Tensor, new_max_T: Tensor) -> tuple[Tensor, Tensor]:
    """The sums taken relative to old_max, made relative to new_max (nothing summed yet: old_max is -inf)."""
    shift_T = torch.where(torch.isinf(old_max_T), 0.0, old_max_T - new_max_T)
    scale_T = shift_T.exp()
    return sum_T * scale_T, (moment_T + sum_T * shift_T) * scale_T
