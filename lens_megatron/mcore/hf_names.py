"""One table, both directions: a Megatron-Core parameter on one rank <-> slices of HF tensors.

The four families name their tensors alike; what differs (biases, q/k norms, experts, a tied head) follows from the spec.
Two module trees are known: the local spec's, and Transformer Engine's, which keeps a norm inside the linear layer after it
and all experts of a rank in one grouped layer. `_extra_state` entries are buffers, not parameters, and stay out.

    linear_qkv   [q q .. k v] per key/value group, groups cut over tp        linear_fc1   gate and up cut over tp, then joined
    linear_proj, linear_fc2   cut by columns over tp                         vocabulary   cut by rows over tp, zeros to pad
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lens_megatron.model_spec import ModelSpec

# read(name, dim, start, stop): rows (dim 0) or columns (dim 1) of an HF tensor; dim None reads it whole.
Read = Callable[[str, int | None, int, int], Tensor]
Kind = Literal["whole", "vocabulary", "columns", "qkv", "gate_up"]


@dataclass(frozen=True)
class Mapping:
    """How one Megatron-Core tensor stands in HF's files."""

    kind: Kind
    hf_names: tuple[str, ...]  # one; q, k, v; or gate, up
    expert: int | None = None  # global index of the expert that it belongs to


_LAYER: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "input_layernorm.weight": ("whole", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": ("whole", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": ("whole", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": ("whole", ("post_attention_layernorm.weight",)),
    "self_attention.q_layernorm.weight": ("whole", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": ("whole", ("self_attn.k_norm.weight",)),
    "self_attention.linear_qkv.weight": ("qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv")),
    "self_attention.linear_qkv.bias": ("qkv", tuple(f"self_attn.{x}_proj.bias" for x in "qkv")),
    "self_attention.linear_proj.weight": ("columns", ("self_attn.o_proj.weight",)),
    "mlp.linear_fc1.weight": ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": ("columns", ("mlp.down_proj.weight",)),
    "mlp.router.weight": ("whole", ("mlp.gate.weight",)),
}
_EXPERT: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "linear_fc1": ("gate_up", ("gate_proj.weight", "up_proj.weight")),
    "linear_fc2": ("columns", ("down_proj.weight",)),
}
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


def mapping_of(name: str, layer: int | None, spec: ModelSpec, first_expert: int = 0) -> Mapping:
    """`name` inside layer `layer` (counted over the whole model), or outside the layers when `layer` is None."""
    if layer is None:
        head = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
        outside: dict[str, tuple[Kind, tuple[str, ...]]] = {
            "embedding.word_embeddings.weight": ("vocabulary", ("model.embed_tokens.weight",)),
            "output_layer.weight": ("vocabulary", (head,)),
            "decoder.final_layernorm.weight": ("whole", ("model.norm.weight",)),
        }
        kind, names = outside[name]
        return Mapping(kind, names)
    prefix = f"model.layers.{layer}."
    if name in _LAYER:
        kind, names = _LAYER[name]
        return Mapping(kind, tuple(prefix + hf for hf in names))
    if match := _LOCAL_EXPERT.fullmatch(name):
        expert, part = int(match[1]) + first_expert, match[2]
    elif match := _GROUPED_EXPERT.fullmatch(name):
        expert, part = int(match[2]) + first_expert, match[1]
    else:
        raise KeyError(f"no HF name is known for {name!r}")
    kind, names = _EXPERT[part]
    return Mapping(kind, tuple(f"{prefix}mlp.experts.{expert}.{hf}" for hf in names), expert)


def read_shard(mapping: Mapping, spec: ModelSpec, rank: int, ranks: int, local_rows: int, read: Read) -> Tensor:
    """This rank's tensor, from the slices that it needs and no others. `local_rows`: rows of the local tensor."""
    names = mapping.hf_names
    if mapping.kind == "whole":
        return read(names[0], None, 0, 0)
    if mapping.kind == "vocabulary":
        start = rank * local_rows
        stop = min(start + local_rows, spec.vocab_size)
        rows = read(names[0], 0, min(start, spec.vocab_size), max(stop, min(start, spec.vocab_size)))
        padding = rows.new_zeros(local_rows - rows.size(0), rows.size(1))
        return torch.cat([rows, padding]) if len(padding) else rows
    if mapping.kind == "columns":
        width = _columns(mapping, spec) // ranks
        return read(names[0], 1, rank * width, (rank + 1) * width)
    if mapping.kind == "gate_up":
        width = _ffn_size(mapping, spec) // ranks
        return torch.cat([read(name, 0, rank * width, (rank + 1) * width) for name in names])
    groups = spec.kv_heads // ranks
    parts = []
    for name, per_group in zip(names, _rows_per_group(spec), strict=True):
        count = groups * per_group
        part = read(name, 0, rank * count, (rank + 1) * count)
        parts.append(part.reshape(groups, per_group, *part.shape[1:]))
    joined = torch.cat(parts, dim=1)
    return joined.reshape(-1, *joined.shape[2:])


def join_shards(mapping: Mapping, spec: ModelSpec, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The HF tensors that the tensor-parallel ranks' `shards` (in rank order) make up."""
    names = mapping.hf_names
    if mapping.kind == "whole":
        return [(names[0], shards[0])]
    if mapping.kind == "vocabulary":
        return [(names[0], torch.cat(list(shards))[: spec.vocab_size].contiguous())]
    if mapping.kind == "columns":
        return [(names[0], torch.cat(list(shards), dim=1))]
    if mapping.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [(name, torch.cat([half[place] for half in halves])) for place, name in enumerate(names)]
    sizes = _rows_per_group(spec)
    parts = [shard.reshape(-1, sum(sizes), *shard.shape[1:]).split(sizes, dim=1) for shard in shards]
    return [
        (name, torch.cat([part[place].reshape(-1, *part[place].shape[2:]) for part in parts]))
        for place, name in enumerate(names)
    ]


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of an HF checkpoint of this model, in the order of the layers."""
    h, d = spec.hidden_size, spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, h)}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (h,)
        for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
            shapes[prefix + f"self_attn.{name}_proj.weight"] = (heads * d, h)
            if spec.qkv_bias:
                shapes[prefix + f"self_attn.{name}_proj.bias"] = (heads * d,)
        if spec.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (d,)
            shapes[prefix + "self_attn.k_norm.weight"] = (d,)
        shapes[prefix + "self_attn.o_proj.weight"] = (h, spec.heads * d)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        mlps = [("mlp.", spec.ffn_size)]
        if spec.moe:
            shapes[prefix + "mlp.gate.weight"] = (spec.moe.experts, h)
            mlps = [(f"mlp.experts.{expert}.", spec.moe.expert_ffn_size) for expert in range(spec.moe.experts)]
        for mlp, ffn in mlps:
            shapes[prefix + mlp + "gate_proj.weight"] = (ffn, h)
            shapes[prefix + mlp + "up_proj.weight"] = (ffn, h)
            shapes[prefix + mlp + "down_proj.weight"] = (h, ffn)
    shapes["model.norm.weight"] = (h,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, h)
    return shapes


def _rows_per_group(spec: ModelSpec) -> tuple[int, int, int]:
    return (spec.heads // spec.kv_heads * spec.head_dim, spec.head_dim, spec.head_dim)


def _ffn_size(mapping: Mapping, spec: ModelSpec) -> int:
    return spec.moe.expert_ffn_size if spec.moe and mapping.expert is not None else spec.ffn_size


def _columns(mapping: Mapping, spec: ModelSpec) -> int:
    if mapping.hf_names[0].endswith("o_proj.weight"):
        return spec.heads * spec.head_dim
    return _ffn_size(mapping, spec)
