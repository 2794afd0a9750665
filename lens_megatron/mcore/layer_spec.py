"""The modules a layer is made of: Transformer Engine's when it is installed, else plain torch ones, on CUDA too."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from lens_megatron.mcore import made_again
from lens_megatron.mcore.attention import PackedAttention
from lens_megatron.mcore.norm import PlainRMSNorm
from lens_megatron.mcore.settings import Recompute


def transformer_engine_available() -> bool:
    """As Megatron-Core sees it: an installed package that does not import (built for another torch or CUDA) is none."""
    return torch.cuda.is_available() and HAVE_TE


def runs_on_engine(dtype: torch.dtype) -> bool:
    """Transformer Engine's packed attention is for half precision."""
    return transformer_engine_available() and dtype != torch.float32


def engine_layer(config: Any) -> Any:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    # In checkpoints Megatron-Core's plain layers give the norm before the experts the name that a dense layer's fused one
    # has, Transformer Engine's do not: neither could load the other's, nor our tools both.
    layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return layer


def block_spec(config: Any, vp_stage: int | None, recompute: Recompute = "none") -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk, and its last norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    lean = recompute == "light"
    if runs_on_engine(config.params_dtype):
        from megatron.core.extensions.transformer_engine import TENorm

        layer = engine_layer(config)
        if lean and not config.num_moe_experts:  # norms are fused into the products that read them
            layer.submodules.mlp = made_again.gated_mlp(layer.submodules.mlp.submodules)
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = PlainRMSNorm
    if lean:
        parts.input_layernorm = parts.pre_mlp_layernorm = made_again.Norm
        parts.self_attention.submodules.linear_qkv = made_again.ColumnLinear
        if not config.num_moe_experts:
            parts.mlp = made_again.gated_mlp(parts.mlp.submodules)
    parts.self_attention.submodules.core_attention = PackedAttention
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = PlainRMSNorm
        parts.self_attention.submodules.k_layernorm = PlainRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=PlainRMSNorm)
