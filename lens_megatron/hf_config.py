"""config.json of the four families, as the fields of a ModelSpec, and back. Plain JSON: transformers is not imported.

Both spellings are read: transformers 4 (`rope_theta` beside `rope_scaling`, `num_experts`) and transformers 5
(`rope_parameters`, `num_local_experts`). What the model built here cannot express is refused, naming the key: a model
that loads and computes something else is worse than one that does not load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import UsageError

if TYPE_CHECKING:
    from lens_megatron.model_spec import ModelSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
SUPPORTED = "llama (Llama 2, 3.x), qwen2 (Qwen2, Qwen2.5), qwen3, qwen3_moe"

# transformers' own defaults, which its config.json may leave out
_ROPE_THETA = 10000.0
_QWEN3_HEAD_DIM = 128

# megatron-core 0.16 takes only `factor`; the rest of Llama 3's formula is fixed in its RotaryEmbedding
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def spec_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a ModelSpec, as a model YAML would write them. `where` is the file, for the errors."""
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UsageError(f"{where}: model_type {family!r} is not supported; supported: {SUPPORTED}")
    _refuse_what_cannot_be_expressed(config, family, where)
    heads, hidden = _integer(config, "num_attention_heads", where), _integer(config, "hidden_size", where)
    fields: dict[str, Any] = {
        "family": family,
        "layers": _integer(config, "num_hidden_layers", where),
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": _kv_heads(config, family, heads, where),
        "head_dim": _head_dim(config, family, hidden, heads, where),
        "vocab_size": _integer(config, "vocab_size", where),
        "norm_eps": _number(config, "rms_norm_eps", where),
        "max_positions": _integer(config, "max_position_embeddings", where),
        "tied": bool(config.get("tie_word_embeddings") or False),
        "qkv_bias": family == "qwen2",
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        **_rope(config, where),
    }
    if family == "qwen3_moe":
        experts = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
        fields["moe"] = {
            "experts": _integer(config, experts, where, also="num_experts"),
            "experts_per_token": _integer(config, "num_experts_per_tok", where),
            "expert_ffn_size": _integer(config, "moe_intermediate_size", where),
        }
        fields["ffn_size"] = config.get("intermediate_size") or fields["moe"]["expert_ffn_size"]
    else:
        fields["ffn_size"] = _integer(config, "intermediate_size", where)
    return fields


def _refuse_what_cannot_be_expressed(config: Mapping[str, Any], family: str, where: str) -> None:
    def refuse(key: str, reason: str) -> None:
        raise UsageError(f"{where}: {key}={config[key]!r}: {reason}")

    architectures = config.get("architectures") or [ARCHITECTURES[family]]
    if ARCHITECTURES[family] not in architectures:
        refuse("architectures", f"only the causal language model is supported: {ARCHITECTURES[family]}")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise UsageError(f"{where}: quantization_config: weights quantised by {method!r}; use the bf16 checkpoint")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "only silu (SwiGLU) is supported")
    if config.get("attention_bias") and family != "qwen2":
        refuse(
            "attention_bias", "it adds a bias to o_proj too, and megatron-core has none there without one in the MLP"
        )
    if config.get("mlp_bias"):
        refuse("mlp_bias", "biases in the MLP are not supported")
    if config.get("use_sliding_window"):
        refuse("use_sliding_window", "sliding-window attention is not supported; set it to false for full attention")
    other_layers = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if other_layers:
        raise UsageError(f"{where}: layer_types has {other_layers}: only full_attention is supported")
    if (config.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse("partial_rotary_factor", "RoPE over a part of the head is not supported")
    if family != "qwen3_moe":
        return
    if config.get("mlp_only_layers"):
        refuse("mlp_only_layers", "every layer must be an expert layer; dense ones among them are not supported")
    if (config.get("decoder_sparse_step") or 1) != 1:
        refuse("decoder_sparse_step", "every layer must be an expert layer (1)")
    if not config.get("norm_topk_prob"):
        raise UsageError(
            f"{where}: norm_topk_prob={config.get('norm_topk_prob')!r} (transformers' default is false): "
            "only routers that normalise over the chosen experts are supported (true)"
        )


def _kv_heads(config: Mapping[str, Any], family: str, heads: int, where: str) -> int:
    if config.get("num_key_value_heads") is None and (family == "llama" or "num_key_value_heads" in config):
        return heads
    return _integer(config, "num_key_value_heads", where)


def _head_dim(config: Mapping[str, Any], family: str, hidden: int, heads: int, where: str) -> int:
    if config.get("head_dim") is not None:
        return _integer(config, "head_dim", where)
    if family == "qwen3":
        return _QWEN3_HEAD_DIM
    if hidden % heads:
        raise UsageError(
            f"{where}: head_dim is missing, and hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    return hidden // heads


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: Any = config.get(key) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UsageError(f"{where}: {key}: expected one set of RoPE parameters for all layers")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    thetas = {
        float(value) for value in (rope.get("rope_theta"), config.get("rope_theta")) if isinstance(value, (int, float))
    }
    if len(thetas) > 1:
        raise UsageError(f"{where}: rope_theta is given twice and differs: {sorted(thetas)}")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError(f"{where}: {key}.partial_rotary_factor: RoPE over a part of the head is not supported")
    fields: dict[str, Any] = {"rope_theta": thetas.pop() if thetas else _ROPE_THETA}
    if kind == "default":
        return fields
    if kind != "llama3":
        raise UsageError(f"{where}: {key}.rope_type={kind!r} is not supported; supported: default, llama3")
    # transformers falls back on max_position_embeddings for the original length; a missing factor is its error too
    given = {"original_max_position_embeddings": config.get("max_position_embeddings"), **rope}
    for name, fixed in _LLAMA3_FIXED.items():
        if given.get(name) != fixed:
            raise UsageError(
                f"{where}: {key}.{name}={given.get(name)!r}: megatron-core 0.16 can only do {fixed:g} "
                "(Llama 3.1, 3.2 and 3.3 have it)"
            )
    return {**fields, "rope_scaling": {"factor": _number(rope, "factor", f"{where}: {key}")}}


def _integer(config: Mapping[str, Any], key: str, where: str, also: str = "") -> int:
    value = config.get(key)
    if value is None:
        raise UsageError(f"{where}: {also or key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{where}: {key}={value!r}: expected a whole number above 0")
    return value


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if value is None:
        raise UsageError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UsageError(f"{where}: {key}={value!r}: expected a number above 0")
    return float(value)


def to_hf_config(spec: ModelSpec, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json in both spellings at once, so that transformers 4.5x, 5.x and SGLang read the same model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
        }
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tied,
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if spec.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if spec.family in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = False
    if spec.moe is not None:
        config |= {
            "num_experts": spec.moe.experts,
            "num_experts_per_tok": spec.moe.experts_per_token,
            "moe_intermediate_size": spec.moe.expert_ffn_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.0,
        }
    return config
