"""The head in plain torch, for any device and dtype: the vocabulary is walked in tiles of a few hundred rows or more.

Shapes: T tokens, H hidden size, V rows of the vocabulary that are not padding, C rows in one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A tile takes about 1 % of the logits it stands for, but never so little that matrix products become slivers.
_TILE_SHARE, _TILE_LEAST, _ROWS_AT_ONCE = 100, 256, 2048


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation and result, whatever the inputs."""
    if a.dtype == torch.float32 or a.dtype == torch.float64:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(sum_: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_ += a @ b, in fp32, without a second tensor of sum_'s size."""
    if a.dtype == sum_.dtype:
        sum_.addmm_(a, b)
        return
    for start in range(0, a.size(0), _ROWS_AT_ONCE):
        sum_[start : start + _ROWS_AT_ONCE] += product(a[start : start + _ROWS_AT_ONCE], b)


def shifted(sum_: Tensor, moment: Tensor, old_max: Tensor, new_max: Tensor) -> tuple[Tensor, Tensor]:
    """The sums taken relative to old_max, made relative to new_max (nothing summed yet: old_max is -inf)."""
    shift = torch.where(torch.isinf(old_max), 0.0, old_max - new_max)
    scale = shift.exp()
    return sum_ * scale, (moment + sum_ * shift) * scale


def _tiles(rows: int) -> list[tuple[int, int]]:
    step = max(_TILE_LEAST, rows // _TILE_SHARE)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def statistics(
    hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over these rows: max z, sum exp(z - max), sum exp(z - max) (z - max) if `entropy`, and the label's z (0: not here)."""
    work_dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    max_T = hidden_TH.new_full((hidden_TH.size(0),), -torch.inf, dtype=work_dtype)
    sum_T, moment_T, at_label_T = (torch.zeros_like(max_T) for _ in range(3))
    for start, stop in _tiles(weight_VH.size(0)):
        z_TC = product(hidden_TH, weight_VH[start:stop].t())
        if temperature != 1.0:
            z_TC.div_(temperature)
        inside_T = (label_T >= start) & (label_T < stop)
        column_T = (label_T - start).clamp(0, stop - start - 1)
        at_label_T += torch.where(inside_T, z_TC.gather(1, column_T[:, None]).squeeze(1), 0.0)
        new_max_T = torch.maximum(max_T, z_TC.amax(dim=1))
        sum_T, moment_T = shifted(sum_T, moment_T, max_T, new_max_T)
        max_T = new_max_T
        z_TC.sub_(max_T[:, None])
        if not entropy:
            sum_T += z_TC.exp_().sum(dim=1)
            continue
        p_TC = z_TC.exp()
        sum_T += p_TC.sum(dim=1)
        moment_T += p_TC.mul_(z_TC).sum(dim=1)
        del z_TC, p_TC  # or they would stand beside the next tile's
    return max_T, sum_T, moment_T, at_label_T


def gradients(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    log_total_T: Tensor,
    entropy_T: Tensor,
    grad_logprob_T: Tensor,
    grad_entropy_T: Tensor,
    temperature: float,
    grad_hidden_TH: Tensor | None,
    grad_weight_VH: Tensor | None,
) -> None:
    """Fills the gradients that are asked for; this rank's part of d hidden."""
    sum_TH = grad_hidden_TH
    if grad_hidden_TH is not None and grad_hidden_TH.dtype != log_total_T.dtype:
        sum_TH = torch.empty_like(hidden_TH, dtype=log_total_T.dtype)
    if sum_TH is not None:
        sum_TH.zero_()
    with_entropy = grad_entropy_T.is_cuda or bool(grad_entropy_T.any())  # a GPU would have to be waited for
    scale_T, entropy_scale_T = grad_logprob_T / temperature, grad_entropy_T / temperature
    for start, stop in _tiles(weight_VH.size(0)):
        tile_CH = weight_VH[start:stop]
        logp_TC = product(hidden_TH, tile_CH.t())
        if temperature != 1.0:
            logp_TC.div_(temperature)
        logp_TC.sub_(log_total_T[:, None])
        if with_entropy:
            grad_TC = logp_TC.exp()
            logp_TC.add_(entropy_T[:, None]).mul_(entropy_scale_T[:, None]).add_(scale_T[:, None])
            grad_TC.mul_(logp_TC.neg_())
        else:
            grad_TC = logp_TC.exp_().mul_(-scale_T[:, None])
        del logp_TC
        inside_T = (label_T >= start) & (label_T < stop)
        column_T = (label_T - start).clamp(0, stop - start - 1)
        grad_TC.scatter_add_(1, column_T[:, None], torch.where(inside_T, scale_T, 0.0)[:, None])
        grad_TC = grad_TC.to(hidden_TH.dtype)
        if sum_TH is not None:
            add_product(sum_TH, grad_TC, tile_CH)
        if grad_weight_VH is not None:
            if grad_weight_VH.dtype == grad_TC.dtype:
                torch.mm(grad_TC.t(), hidden_TH, out=grad_weight_VH[start:stop])
            else:
                grad_weight_VH[start:stop] = product(grad_TC.t(), hidden_TH)
        del grad_TC
    if grad_hidden_TH is not None and sum_TH is not None and sum_TH is not grad_hidden_TH:
        grad_hidden_TH.copy_(sum_TH)
