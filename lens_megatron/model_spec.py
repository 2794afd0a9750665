"""The shape of a model, from model_configs/NAME.yaml or any HF config.json of the four supported families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the low RoPE frequencies (HF rope_type "llama3")."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class MoESpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    experts: int
    experts_per_token: int
    expert_ffn_size: int


@dataclass(frozen=True)
class ModelSpec:
    """Everything that decides the tensors and the arithmetic of a model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    family: Family
    layers: int
    hidden_size: int
    ffn_size: int  # of the dense MLP; unused when moe is set
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: Llama3Scaling | None = None
    moe: MoESpec | None = None
