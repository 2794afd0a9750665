"""Tiny HF models of every family with weights that make every mistake visible: norms and biases far from 1 and 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# 125 words: padding rows under every layout, and a number that divides by nothing used here
_SHAPE: dict[str, Any] = {
    "vocab_size": 125,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS = ("llama", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe")


def hf_config(kind: str) -> Any:
    import transformers

    if kind == "llama":
        return transformers.LlamaConfig(
            **_SHAPE, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE
        )
    if kind == "qwen2":
        return transformers.Qwen2Config(
            **_SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters=_PLAIN_ROPE
        )
    if kind in ("qwen3", "qwen3_tied"):
        return transformers.Qwen3Config(
            **_SHAPE,
            head_dim=16,
            rms_norm_eps=1e-6,
            tie_word_embeddings=kind == "qwen3_tied",
            rope_parameters=_PLAIN_ROPE,
        )
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **_SHAPE,
            head_dim=16,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            moe_intermediate_size=24,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.0,
            rope_parameters=_PLAIN_ROPE,
        )
    raise ValueError(kind)


def hf_model(kind: str, seed: int = 0, noise: float = 0.0) -> Any:
    """`noise` shifts every weight a little: a policy beside its reference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config(kind), dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.3 if name.endswith("bias") else 0.15, generator=generator)
        shift = torch.Generator().manual_seed(seed + 1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=shift), alpha=noise)
    return model.eval()


def save_hf(kind: str, folder: Path, **options: Any) -> Path:
    hf_model(kind, **options).save_pretrained(folder)
    return folder


def random_sequences(count: int, seed: int = 0, longest: int = 37, vocabulary: int = 125) -> list[torch.Tensor]:
    """Ragged: lengths that divide by nothing in particular."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]
