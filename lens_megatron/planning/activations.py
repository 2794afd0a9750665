"""What a forward pass keeps for the backward pass, in bytes of one rank: a list per layer, each entry with its reason.

Tensors that share a storage are counted once, parameters not at all. The lists are read off the modules as they run (the
local layer spec; what Transformer Engine keeps is taken from its sources and has not been compared with a run).

    t  tokens of this context-parallel rank          s  of these, the ones this tensor-parallel rank holds (sequence parallel)
    h  hidden size      q, k  width of queries, of keys, on this rank      f  width of the MLP (an expert) on this rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.mcore.settings import Recompute
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.shards import layers_of_chunk

_LOSS_BYTES = 64  # a token: the loss's own tensors, fp32 and masks


@dataclass(frozen=True)
class Kernels:
    """Which implementations run; each keeps other things."""

    name: str
    attention: Literal["sdpa", "varlen", "engine"]
    fused_norm: bool  # else in fp32 by elementary operations
    fused_swiglu: bool
    fused_rope: bool


CPU = Kernels("plain torch on CPU (SDPA by sequence)", "sdpa", fused_norm=False, fused_swiglu=False, fused_rope=False)
CUDA = Kernels("plain torch on CUDA (varlen flash)", "varlen", fused_norm=True, fused_swiglu=True, fused_rope=False)
ENGINE = Kernels("Transformer Engine", "engine", fused_norm=True, fused_swiglu=True, fused_rope=True)


@dataclass(frozen=True)
class Pass:
    """One micro-batch: `tokens` over all context-parallel ranks, in sequences of these padded lengths."""

    tokens: int
    lengths: tuple[int, ...] = ()

    def squares(self) -> int:
        return sum(length * length for length in self.lengths)


@dataclass(frozen=True)
class Kept:
    """Bytes that one micro-batch leaves behind."""

    layer_input: int  # what a recomputed layer needs
    attention: int  # all of a layer but its MLP or experts, its input included
    mlp: int
    mlp_input: int  # what a recomputed MLP needs
    light: int  # of a layer, what norms and the MLP's activation give
    light_again: int  # the largest of these
    head: int  # final norm, head and loss
    embedding: int
    shared: int  # by all layers of a chunk, once

    @property
    def layer(self) -> int:
        return self.attention + self.mlp

    def in_layers(self, layers: int, recompute: Recompute) -> int:
        of_one = {
            "none": self.layer,
            "light": self.layer - self.light,
            "selective": self.attention + self.mlp_input,
            "full": self.layer_input,
        }[recompute]
        return layers * of_one + self.shared

    def computed_again(self, recompute: Recompute) -> int:
        """What one layer holds while the backward pass is in it, beside what was kept."""
        again = {"none": 0, "light": self.light_again, "selective": self.mlp - self.mlp_input, "full": self.layer}
        return again[recompute]


def kept_by_one_pass(spec: ModelSpec, layout: ParallelConfig, one: Pass, element: int, kernels: Kernels) -> Kept:
    """`element`: bytes of an activation, 2 in bf16."""
    t = -(-one.tokens // layout.cp)
    s = -(-t // layout.tp) if layout.sequence_parallel else t
    h = spec.hidden_size
    norm_h = _norm(h, s, s, element, kernels)
    attention = norm_h + s * h * element + _attention(spec, layout, t, one, element, kernels)
    mlp, mlp_input = _mlp(spec, layout, t, s, element, kernels)
    head = norm_h + t * h * element + t * 16 + t * _LOSS_BYTES
    shared = 0 if kernels.fused_rope else t * spec.head_dim * element  # a cosine and a sine for each pair
    shared += 8 * _seen(layout, one) if _gathers(layout, kernels) else 0  # the order of the keys
    light, light_again = _light(spec, layout, t, s, element, kernels)
    return Kept(
        layer_input=s * h * element,
        attention=attention + norm_h,
        mlp=mlp,
        mlp_input=mlp_input,
        light=light,
        light_again=light_again,
        head=head,
        embedding=8 * t,
        shared=shared,
    )


def _gathers(layout: ParallelConfig, kernels: Kernels) -> bool:
    """Keys and values of all context-parallel ranks."""
    return layout.cp > 1 and kernels.attention != "engine"


def _seen(layout: ParallelConfig, one: Pass) -> int:
    """Keys from each sequence's start to the end of each of its two chunks on a rank."""
    return one.tokens * (2 * layout.cp + 1) // (2 * layout.cp)


def _norm(width: int, tokens: int, rows: int, element: int, kernels: Kernels) -> int:
    """Its input (or that input in fp32), 1/rms of each row, and what it normalised unless the kernel is fused."""
    if kernels.fused_norm:
        return tokens * width * element + 4 * rows
    return 2 * tokens * width * 4 + 4 * rows


def _attention(spec: ModelSpec, layout: ParallelConfig, t: int, one: Pass, element: int, kernels: Kernels) -> int:
    heads, kv_heads = spec.heads // layout.tp, spec.kv_heads // layout.tp
    q, k = heads * spec.head_dim, kv_heads * spec.head_dim
    gathers = _gathers(layout, kernels)
    norm_views = spec.qk_norm and (kernels.fused_norm or element == 4)
    kept = 0
    if not gathers or norm_views:  # queries, keys and values in one storage, held by a view of the values or keys
        kept += t * (q + 2 * k) * element
    if spec.qk_norm:
        kept += _norm(q, t, t * heads, element, kernels) + _norm(k, t, t * kv_heads, element, kernels)
        kept -= t * k * element if norm_views else 0  # the keys' norm keeps a view of that storage
    kept += t * q * element + t * heads * 4  # rotated queries, log-sums
    kept += (2 * _seen(layout, one) if gathers else t) * k * element  # keys and values seen; or rotated keys
    if gathers and kernels.attention == "sdpa":  # and masks
        kept += one.squares() * (2 * layout.cp + 1) // (4 * layout.cp**2) * element
    # the output, and again as linear_proj's input where sequences are concatenated
    return kept + (2 if kernels.attention == "sdpa" else 1) * t * q * element


def _mlp(spec: ModelSpec, layout: ParallelConfig, t: int, s: int, element: int, kernels: Kernels) -> tuple[int, int]:
    """(all that is kept, its input)."""
    h = spec.hidden_size
    mlp_input = s * h * element
    if spec.moe is None:
        f = spec.ffn_size // layout.tp
        # both halves, [the shifted half, the silu,] and the product that goes down
        return mlp_input + t * f * element * (3 if kernels.fused_swiglu else 5), mlp_input
    f, chosen = spec.moe.expert_ffn_size // layout.expert_tp, spec.moe.experts_per_token
    # the router's choice; then every copy of a token that its expert reads, on average over the ranks
    routing = s * (16 * chosen + 8 * chosen + 5 * spec.moe.experts + 8 * chosen)
    copies = s * chosen * layout.expert_tp
    experts = copies * (h + f * (3 if kernels.fused_swiglu else 6)) * element + 4 * copies
    return mlp_input + routing + experts, mlp_input


def _light(spec: ModelSpec, layout: ParallelConfig, t: int, s: int, element: int, kernels: Kernels) -> tuple[int, int]:
    """(what `recompute: light` does not keep, the largest tensor of it). Transformer Engine fuses dense layers' norms."""
    norm = s * spec.hidden_size * element
    if spec.moe is not None:
        if kernels.attention != "engine":
            return norm, norm  # experts are Megatron-Core's own, and the router keeps the other norm
        copies = s * spec.moe.experts_per_token * layout.expert_tp
        product = copies * (spec.moe.expert_ffn_size // layout.expert_tp) * element
        return norm + product, product
    product = t * (spec.ffn_size // layout.tp) * element
    if kernels.attention == "engine":
        return product, product
    return 2 * norm + product * (1 if kernels.fused_swiglu else 2), product  # unfused, Megatron-Core keeps a half twice


def chunks_in_flight(layout: ParallelConfig, stage: int, microbatches: int) -> Iterator[tuple[int, ...]]:
    """Of each chunk, how many forward passes still wait for their backward pass: 1F1B or its interleaved form, at each moment
    before a backward pass begins."""
    # it repeats itself after a round of all chunks; four rounds show the fullest moment
    microbatches = min(microbatches, 4 * layout.pp)
    starts = range(0, microbatches, layout.pp)  # the schedule goes round the chunks, `pp` micro-batches in each
    order = [
        virtual
        for start in starts
        for virtual in range(layout.vpp)
        for _ in range(min(layout.pp, microbatches - start))
    ]
    warm_up = layout.pp - stage - 1
    if layout.vpp > 1:
        warm_up = 2 * warm_up + (layout.vpp - 1) * layout.pp
    warm_up = min(warm_up, len(order) - 1)
    counts = [0] * layout.vpp
    for number, virtual in enumerate(order):
        counts[virtual] += 1
        if number >= warm_up:
            yield tuple(counts)
            counts[layout.vpp - 1 - order[number - warm_up]] -= 1


def activation_bytes(
    spec: ModelSpec,
    layout: ParallelConfig,
    stage: int,
    one: Pass,
    *,
    microbatches: int,
    element: int,
    kernels: Kernels,
    recompute: Recompute,
) -> int:
    """The most that is kept at once on a rank of this stage, with what is computed again in the backward pass."""
    kept = kept_by_one_pass(spec, layout, one, element, kernels)
    of_chunk = [
        kept.in_layers(layers_of_chunk(spec, layout, stage, virtual), recompute)
        + (kept.embedding if (stage, virtual) == (0, 0) else 0)
        for virtual in range(layout.vpp)
    ]
    again, largest = kept.computed_again(recompute), 0
    for counts in chunks_in_flight(layout, stage, microbatches):
        total = sum(count * one_pass for count, one_pass in zip(counts, of_chunk, strict=True))
        at_the_head = stage == layout.pp - 1 and counts[-1] > 0
        largest = max(largest, total + max(kept.head if at_the_head else 0, again))
    return largest
