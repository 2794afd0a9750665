"""The head on a GPU: fused Triton kernels where logits are formed, cuBLAS where gradients are multiplied out.

UNMEASURED ON A GPU: run in Triton's interpreter and compiled for sm_90, never timed.

Forward: one kernel walks the vocabulary online, a few splits of it side by side; their partial maxima and sums are then
combined. 2 N H V operations for N tokens.

Backward: for every chunk of tokens and every chunk of the vocabulary, a kernel computes the logits again and writes
their gradient; two matrix products turn that into d hidden and d weight. 6 N H V operations, 4 of them credited, so that
forward and backward together cannot exceed (2 + 4) / (2 + 6) = 75 % of the matrix rate.

Memory beyond inputs and gradients, at most `_SCRATCH` bytes: the chunk's gradient of logits, and d hidden of the chunk's
tokens in fp32. d weight is summed over token chunks in its own dtype: one rounding a chunk. (fp32 sums of either whole
gradient would be 2.7 % and 6.3 % of materialised logits at 64k tokens, hidden 4,096, vocabulary 151,936.)

Nothing depends on timing: tile sizes come from a table, not from an autotuner, and there are no atomics, so that the same
inputs give the same bits, in a resumed run too.

Shapes: T tokens, H hidden size, V rows of the vocabulary that are not padding, S splits, C rows in one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lens_megatron.mcore import head_kernels
from lens_megatron.mcore.head_chunked import shifted

_LOG2E = math.log2(math.e)
# 0.5 % of [65,536, 151,936] fp32 logits is 199 MB; what is left of it goes to vectors of a few bytes a token
_SCRATCH = 184_000_000
_SHARE_OF_HIDDEN = 0.65  # of the scratch; the rest holds the gradient of logits
_LEAST_CHUNK = 512  # rows of the vocabulary: fewer make slivers of the matrix products


@dataclass(frozen=True)
class Tiles:
    """How one program's tile of logits is cut and run."""

    tokens: int
    rows: int
    hidden: int  # depth of one step of the product
    warps: int
    stages: int
    group: int  # blocks of tokens that share the vocabulary's tiles in the L2 cache
    descriptors: bool  # loads by the tensor memory accelerator (Hopper and later)


_HOPPER = Tiles(tokens=128, rows=256, hidden=64, warps=8, stages=3, group=16, descriptors=True)
_AMPERE = Tiles(tokens=128, rows=128, hidden=32, warps=8, stages=3, group=16, descriptors=False)
_FP32 = Tiles(tokens=64, rows=64, hidden=32, warps=4, stages=2, group=16, descriptors=False)
_INTERPRETER = Tiles(tokens=16, rows=32, hidden=16, warps=1, stages=1, group=2, descriptors=False)


def interpreted() -> bool:
    return not isinstance(head_kernels.statistics_kernel, triton.runtime.JITFunction)


def tiles_for(hidden_TH: Tensor, weight_VH: Tensor) -> Tiles:
    if not hidden_TH.is_cuda:
        return _INTERPRETER
    if hidden_TH.dtype == torch.float32:
        return _FP32
    hopper = torch.cuda.get_device_capability(hidden_TH.device)[0] == 9
    return _HOPPER if hopper and _takes_descriptors(hidden_TH) and _takes_descriptors(weight_VH) else _AMPERE


def _takes_descriptors(matrix: Tensor) -> bool:
    """The tensor memory accelerator wants rows of multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def choose_splits(token_blocks: int, vocabulary_tiles: int, processors: int, group: int) -> tuple[int, int]:
    """How many splits of the vocabulary, and tiles in each: the fewest that keep all processors busy to the end.

    At least so many that `group` blocks of tokens times the splits fill the processors: more blocks at a time would not
    fit the L2 cache.
    """
    least = min(vocabulary_tiles, -(-processors // group))
    most = min(vocabulary_tiles, max(least, 64, 2 * processors // token_blocks))
    best, best_time = (1, vocabulary_tiles), math.inf
    for wanted in range(least, most + 1):
        tiles = -(-vocabulary_tiles // wanted)
        splits = -(-vocabulary_tiles // tiles)
        time = -(-token_blocks * splits // processors) * tiles
        if time < 0.99 * best_time:  # more splits than needed only add partial results
            best, best_time = (splits, tiles), time
    return best


def statistics(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    temperature: float,
    entropy: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over these rows: max z, sum exp(z - max), sum exp(z - max) (z - max) if `entropy`, and the label's z (0: not here)."""
    tokens, rows = hidden_TH.size(0), weight_VH.size(0)
    if tokens == 0 or rows == 0:
        nothing_T = torch.zeros(tokens, dtype=torch.float32, device=hidden_TH.device)
        return nothing_T - torch.inf, nothing_T, nothing_T, nothing_T
    tiles = tiles or tiles_for(hidden_TH, weight_VH)
    token_blocks = -(-tokens // tiles.tokens)
    splits, tiles_per_split = choose_splits(token_blocks, -(-rows // tiles.rows), _processors(hidden_TH), tiles.group)
    partial_4ST = torch.empty(4, splits, tokens, dtype=torch.float32, device=hidden_TH.device)
    head_kernels.statistics_kernel[(token_blocks * splits,)](
        *_operands(hidden_TH, weight_VH, tiles),
        label_T,
        partial_4ST,
        tokens,
        rows,
        splits,
        tiles_per_split,
        _LOG2E / temperature,
        hidden_TH.stride(0),
        weight_VH.stride(0),
        ENTROPY=entropy,
        **_options(hidden_TH, tiles),
    )
    max_ST, sum_ST, moment_ST, label_ST = partial_4ST.unbind()
    max_ST = max_ST / _LOG2E
    max_T = max_ST.amax(0)
    sum_ST, moment_ST = shifted(sum_ST, moment_ST / _LOG2E, max_ST, max_T)
    return max_T, sum_ST.sum(0), moment_ST.sum(0), label_ST.sum(0) / _LOG2E


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
    tiles: Tiles | None = None,
    scratch: int = _SCRATCH,
) -> None:
    """Fills the gradients that are asked for; this rank's part of d hidden."""
    tokens, rows, hidden = hidden_TH.size(0), weight_VH.size(0), hidden_TH.size(1)
    if tokens == 0 or rows == 0:
        for gradient in (grad_hidden_TH, grad_weight_VH):
            if gradient is not None:
                gradient.zero_()
        return
    tiles = tiles or tiles_for(hidden_TH, weight_VH)
    token_chunk, row_chunk = chunk_sizes(tokens, rows, hidden, hidden_TH.element_size(), tiles, scratch)
    options = _options(hidden_TH, tiles)
    log_total_T, entropy_T = log_total_T * _LOG2E, entropy_T * _LOG2E
    scale_T, entropy_scale_T = grad_logprob_T / temperature, grad_entropy_T / (temperature * _LOG2E)
    buffer = hidden_TH.new_empty(min(token_chunk, tokens) * min(row_chunk, rows))
    for first in range(0, tokens, token_chunk):
        part = slice(first, min(first + token_chunk, tokens))
        chunk_TH = hidden_TH[part]
        count = chunk_TH.size(0)
        sum_TH, in_place = None, False
        if grad_hidden_TH is not None:
            in_place = grad_hidden_TH.dtype == torch.float32
            sum_TH = grad_hidden_TH[part] if in_place else torch.empty_like(chunk_TH, dtype=torch.float32)
            sum_TH.zero_()
        for start in range(0, rows, row_chunk):
            chunk_CH = weight_VH[start : min(start + row_chunk, rows)]
            width = chunk_CH.size(0)
            grad_TC = buffer[: count * width].view(count, width)
            head_kernels.gradient_kernel[(-(-count // tiles.tokens) * -(-width // tiles.rows),)](
                *_operands(chunk_TH, chunk_CH, tiles),
                label_T[part],
                log_total_T[part],
                entropy_T[part],
                scale_T[part],
                entropy_scale_T[part],
                grad_TC,
                count,
                width,
                start,
                _LOG2E / temperature,
                chunk_TH.stride(0),
                chunk_CH.stride(0),
                grad_TC.stride(0),
                **options,
            )
            if sum_TH is not None:
                _add_product(sum_TH, grad_TC, chunk_CH)
            if grad_weight_VH is not None:
                target_CH = grad_weight_VH[start : start + width]
                if first == 0:
                    torch.mm(grad_TC.t(), chunk_TH, out=target_CH)
                else:
                    target_CH.addmm_(grad_TC.t(), chunk_TH)
        if grad_hidden_TH is not None and sum_TH is not None and not in_place:
            grad_hidden_TH[part] = sum_TH


def chunk_sizes(tokens: int, rows: int, hidden: int, element_size: int, tiles: Tiles, scratch: int) -> tuple[int, int]:
    """Tokens and vocabulary rows worked on at a time: as much as `scratch` bytes hold, cut evenly.

    Many tokens come first: every further chunk of them rounds d weight once more.
    """
    most_tokens = max(tiles.tokens, int(_SHARE_OF_HIDDEN * scratch) // (4 * hidden))
    # but a chunk of the vocabulary is never a sliver
    most_tokens = min(most_tokens, max(tiles.tokens, scratch // (4 * hidden + element_size * min(rows, _LEAST_CHUNK))))
    token_chunk = _even(tokens, most_tokens, tiles.tokens)
    left = scratch - 4 * hidden * token_chunk
    most_rows = max(tiles.rows, left // (element_size * token_chunk))
    return token_chunk, _even(rows, most_rows, tiles.rows)


def _even(count: int, most: int, unit: int) -> int:
    """The size of equal parts of `count`, each at most `most` and a multiple of `unit`."""
    most = max(unit, most // unit * unit)
    parts = math.ceil(count / most)
    return min(most, math.ceil(count / parts / unit) * unit)


def _add_product(sum_TH: Tensor, a: Tensor, b: Tensor) -> None:
    """sum_TH += a @ b, accumulated in fp32 in place."""
    if a.dtype == sum_TH.dtype:
        sum_TH.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(sum_TH, a, b, out_dtype=torch.float32, out=sum_TH)
    else:  # the interpreter's
        sum_TH.addmm_(a.float(), b.float())


def _operands(hidden_TH: Tensor, weight_VH: Tensor, tiles: Tiles) -> tuple[Any, Any]:
    if not tiles.descriptors:
        return hidden_TH, weight_VH
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden_TH, [tiles.tokens, tiles.hidden]),
        TensorDescriptor.from_tensor(weight_VH, [tiles.rows, tiles.hidden]),
    )


def _options(hidden_TH: Tensor, tiles: Tiles) -> dict[str, Any]:
    return {
        "HIDDEN": hidden_TH.size(1),
        "BLOCK_T": tiles.tokens,
        "BLOCK_V": tiles.rows,
        "BLOCK_H": tiles.hidden,
        "GROUP": tiles.group,
        "DESCRIPTORS": tiles.descriptors,
        # tf32, Triton's default for fp32 products, keeps three digits
        "PRECISION": "ieee" if hidden_TH.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _processors(where: Tensor) -> int:
    return torch.cuda.get_device_properties(where.device).multi_processor_count if where.is_cuda else 4
