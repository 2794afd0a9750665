"""The tensors that one rank of a layout holds, in the order in which Megatron-Core registers them (its local layer spec).

The order matters: gradient buffers align every tensor and are cut at fixed places over the data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lens_megatron.mcore.layout import ParallelConfig, padded_vocab_size
from lens_megatron.model_spec import ModelSpec


@dataclass(frozen=True)
class ChunkTensors:
    """Sizes, in elements, of one pipeline chunk (one of `vpp` on a rank)."""

    dense: tuple[int, ...]  # reduced over all data- and context-parallel ranks
    expert: tuple[int, ...]  # reduced over the ranks that hold the same experts; empty without expert parallelism
    shared: tuple[int, ...]  # places in `dense` of a tied embedding that two stages hold: it has a bucket of its own

    @property
    def elements(self) -> int:
        return sum(self.dense) + sum(self.expert)


def layers_of_chunk(spec: ModelSpec, layout: ParallelConfig, stage: int, virtual: int) -> int:
    slots = (spec.layers + (2 if layout.ends_count_as_layers else 0)) // (layout.pp * layout.vpp)
    first, last = _is_first(stage, virtual), _is_last(layout, stage, virtual)
    return slots - (int(first) + int(last) if layout.ends_count_as_layers else 0)


def chunks_of_stage(spec: ModelSpec, layout: ParallelConfig, stage: int) -> list[ChunkTensors]:
    """What every rank of a pipeline stage holds, chunk by chunk."""
    return [_chunk(spec, layout, stage, virtual) for virtual in range(layout.vpp)]


def kinds_of_stages(layout: ParallelConfig) -> list[int]:
    """One stage of each kind: the first, one of the middle, the last."""
    return sorted({0, min(1, layout.pp - 1), layout.pp - 1})


def _chunk(spec: ModelSpec, layout: ParallelConfig, stage: int, virtual: int) -> ChunkTensors:
    first, last = _is_first(stage, virtual), _is_last(layout, stage, virtual)
    table = padded_vocab_size(spec, layout.tp) // layout.tp * spec.hidden_size
    layers = layers_of_chunk(spec, layout, stage, virtual)
    dense_layer, expert_layer = _layer(spec, layout)
    dense = [table] if first else []
    dense += dense_layer * layers
    dense += [spec.hidden_size] if last else []
    if last and not (spec.tied and first):
        dense.append(table)
    tied_over_stages = spec.tied and layout.pp > 1
    shared = [0] if first and tied_over_stages else []
    if last and tied_over_stages and not first:
        shared.append(len(dense) - 1)
    return ChunkTensors(tuple(dense), tuple(expert_layer * layers), tuple(shared))


def _layer(spec: ModelSpec, layout: ParallelConfig) -> tuple[list[int], list[int]]:
    q, kv = spec.heads * spec.head_dim // layout.tp, spec.kv_heads * spec.head_dim // layout.tp
    hidden = spec.hidden_size
    dense = [hidden, q * hidden, (q + 2 * kv) * hidden]  # input norm, linear_proj, linear_qkv
    if spec.qkv_bias:
        dense.append(q + 2 * kv)
    if spec.qk_norm:
        dense += [spec.head_dim, spec.head_dim]
    dense.append(hidden)  # the norm before the MLP
    if spec.moe is None:
        ffn = spec.ffn_size // layout.tp
        return [*dense, 2 * ffn * hidden, ffn * hidden], []
    ffn = spec.moe.expert_ffn_size // layout.expert_tp
    experts = [2 * ffn * hidden, ffn * hidden] * (spec.moe.experts // layout.ep)
    dense.append(spec.moe.experts * hidden)  # router
    # without expert parallelism experts are reduced like everything else
    return (dense, experts) if layout.ep > 1 else ([*dense, *experts], [])


def _is_first(stage: int, virtual: int) -> bool:
    return stage == 0 and virtual == 0


def _is_last(layout: ParallelConfig, stage: int, virtual: int) -> bool:
    return stage == layout.pp - 1 and virtual == layout.vpp - 1
