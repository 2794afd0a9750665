"""One table, both directions: which HF tensors a Megatron-Core parameter stands for. Names and shapes, no tensors.

The four families name their tensors alike; what differs (biases, q/k norms, experts, a tied head) follows from the spec.
Two module trees are known: the local spec's, and Transformer Engine's, which keeps a norm inside the linear layer after it
and all experts of a rank in one grouped layer. `_extra_state` entries are buffers, not parameters, and stay out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lens_megatron.model_spec import ModelSpec

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
