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

from lens_megatron.mcore.attention import PackedAttention


def transformer_engine_available() -> bool:
    """As Megatron-Core sees it: an installed package that does not import (built for another torch or CUDA) is none."""
    return torch.cuda.is_available() and HAVE_TE


class PlainRMSNorm(torch.nn.RMSNorm):
    """Megatron-Core's torch norm refuses sequence parallelism, which only needs this mark on the weight.

    The mark tells finalize_model_grads to sum the gradient over the tensor-parallel ranks; without it the norms' weights
    drift apart silently.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk, and its last norm."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    if transformer_engine_available():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = PlainRMSNorm
    parts.self_attention.submodules.core_attention = PackedAttention
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = PlainRMSNorm
        parts.self_attention.submodules.k_layernorm = PlainRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=PlainRMSNorm)
