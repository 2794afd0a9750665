"""Triton kernels of the head: hidden states x vocabulary rows, tile by tile, without ever storing the logits.

UNMEASURED ON A GPU: these kernels have run in Triton's interpreter and been compiled for sm_90, and nothing more.

Both kernels form one [BLOCK_T, BLOCK_V] tile of logits at a time on the tensor cores with fp32 accumulation. Logits are
kept in base 2 (multiplied by log2 e / temperature), so that exp is one instruction; the callers turn logarithms back.

Programs are ordered so that those running at the same time share operands in the L2 cache: GROUP blocks of tokens, all
of whose vocabulary tiles come before the next blocks'. No atomics: every number is written once, by one program.
"""

# mypy: ignore-errors
# (what stands in a kernel is read by Triton's compiler; its types are none of Python's)

import triton
import triton.language as tl

# Stands for minus infinity: finite, so that differences and products with 0 stay numbers.
_NEVER = tl.constexpr(-1.0e30)


@triton.jit
def _logits_tile(
    hidden,
    weight,
    first_token,
    first_row,
    tokens,
    rows,
    hidden_stride,
    weight_stride,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden . weight of one tile. Tokens and rows past the end hold copies or zeros, which the callers drop."""
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    if DESCRIPTORS:
        for start in range(0, HIDDEN, BLOCK_H):
            h = hidden.load([first_token, start])
            w = weight.load([first_row, start])
            logits = tl.dot(h, w.T, logits, input_precision=PRECISION)
    else:
        token = tl.minimum(first_token + tl.arange(0, BLOCK_T), tokens - 1).to(tl.int64)
        row = tl.minimum(first_row + tl.arange(0, BLOCK_V), rows - 1).to(tl.int64)
        column = tl.arange(0, BLOCK_H)
        h_at = hidden + token[:, None] * hidden_stride + column[None, :]
        w_at = weight + row[None, :] * weight_stride + column[:, None]
        for start in range(0, HIDDEN, BLOCK_H):
            if HIDDEN % BLOCK_H == 0:
                h = tl.load(h_at)
                w = tl.load(w_at)
            else:
                h = tl.load(h_at, mask=column[None, :] < HIDDEN - start, other=0.0)
                w = tl.load(w_at, mask=column[:, None] < HIDDEN - start, other=0.0)
            logits = tl.dot(h, w, logits, input_precision=PRECISION)
            h_at += BLOCK_H
            w_at += BLOCK_H
    return logits


@triton.jit
def _place(program, token_blocks, others, GROUP: tl.constexpr):
    """Which block of tokens, and which of the `others` beside it, this program works on."""
    first_block = (program // (GROUP * others)) * GROUP
    blocks = tl.minimum(token_blocks - first_block, GROUP)
    within = program % (GROUP * others)
    return first_block + within % blocks, within // blocks


# counts vary from pack to pack: a kernel compiled for each kind of them would stall training for seconds
@triton.jit(do_not_specialize=["tokens", "rows", "splits", "tiles_per_split"])
def statistics_kernel(
    hidden,  # [tokens, HIDDEN], pointer or descriptor
    weight,  # [rows, HIDDEN]
    label,  # [tokens] row of each token's label; outside [0, rows) where another rank has it
    partial,  # out [4, splits, tokens] fp32: maximum, sum, moment, the label's logit; all in base 2
    tokens,
    rows,
    splits,
    tiles_per_split,
    scale,  # log2 e / temperature
    hidden_stride,
    weight_stride,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of tokens against one split of the vocabulary, online over its tiles."""
    block, split = _place(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), splits, GROUP)
    first_token = block * BLOCK_T
    token = first_token + tl.arange(0, BLOCK_T)
    here = token < tokens
    wanted = tl.load(label + token, mask=here, other=-1)
    # or a label of the next rank would be found in the last tile's padding
    wanted = tl.where(wanted < rows, wanted, -1)
    maximum = tl.full((BLOCK_T,), _NEVER, dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_T,), dtype=tl.float32)
    at_label = tl.zeros((BLOCK_T,), dtype=tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(rows, BLOCK_V))):
        first_row = tile * BLOCK_V
        z = scale * _logits_tile(
            hidden,
            weight,
            first_token,
            first_row,
            tokens,
            rows,
            hidden_stride,
            weight_stride,
            HIDDEN,
            BLOCK_T,
            BLOCK_V,
            BLOCK_H,
            DESCRIPTORS,
            PRECISION,
        )
        row = first_row + tl.arange(0, BLOCK_V)
        z = tl.where(row[None, :] < rows, z, _NEVER)
        at_label += tl.sum(tl.where(row[None, :] == wanted[:, None], z, 0.0), axis=1)
        new_maximum = tl.maximum(maximum, tl.max(z, axis=1))
        z = z - new_maximum[:, None]
        p = tl.exp2(z)
        shift = maximum - new_maximum
        shrink = tl.exp2(shift)
        if ENTROPY:
            moment = (moment + total * shift) * shrink + tl.sum(p * z, axis=1)
        total = total * shrink + tl.sum(p, axis=1)
        maximum = new_maximum
    at = partial + split * tokens + token
    tl.store(at, maximum, mask=here)
    tl.store(at + splits * tokens, total, mask=here)
    tl.store(at + 2 * splits * tokens, moment, mask=here)
    tl.store(at + 3 * splits * tokens, at_label, mask=here)


@triton.jit(do_not_specialize=["tokens", "rows", "first_label"])
def gradient_kernel(
    hidden,  # [tokens, HIDDEN], pointer or descriptor
    weight,  # [rows, HIDDEN]: one chunk of the vocabulary
    label,  # [tokens]
    log_total,  # [tokens] log of the sum of exp over the whole vocabulary, base 2
    entropy,  # [tokens] base 2
    label_scale,  # [tokens] d loss / d log p, over the temperature
    entropy_scale,  # [tokens] d loss / d entropy, over the temperature, times ln 2
    gradient,  # out [tokens, rows]: d loss / d (hidden . weight)
    tokens,
    rows,
    first_label,  # the chunk's first row among this rank's
    scale,
    hidden_stride,
    weight_stride,
    gradient_stride,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[label] s - p (s + e (log p + entropy)) of one tile, its logits computed again."""
    block, tile = _place(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(rows, BLOCK_V), GROUP)
    first_token = block * BLOCK_T
    first_row = tile * BLOCK_V
    z = scale * _logits_tile(
        hidden,
        weight,
        first_token,
        first_row,
        tokens,
        rows,
        hidden_stride,
        weight_stride,
        HIDDEN,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        DESCRIPTORS,
        PRECISION,
    )
    token = first_token + tl.arange(0, BLOCK_T)
    row = first_row + tl.arange(0, BLOCK_V)
    here = token < tokens
    wanted = tl.load(label + token, mask=here, other=-1) - first_label
    of_label = tl.load(label_scale + token, mask=here, other=0.0)
    of_entropy = tl.load(entropy_scale + token, mask=here, other=0.0)
    logp = z - tl.load(log_total + token, mask=here, other=0.0)[:, None]
    p = tl.exp2(logp)
    towards = of_label + of_entropy * tl.load(entropy + token, mask=here, other=0.0)
    found = tl.where(row[None, :] == wanted[:, None], of_label[:, None], 0.0)
    found -= p * (towards[:, None] + of_entropy[:, None] * logp)
    at = gradient + token.to(tl.int64)[:, None] * gradient_stride + row[None, :]
    tl.store(at, found.to(gradient.dtype.element_ty), mask=here[:, None] & (row[None, :] < rows))
