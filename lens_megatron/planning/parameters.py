"""How many parameters a model has. Arithmetic only, and exact: the counts equal the published ones."""

from __future__ import annotations

from dataclasses import dataclass

from lens_megatron.model_spec import ModelSpec


@dataclass(frozen=True)
class LayerParameters:
    """One transformer layer."""

    attention: int  # projections and their biases
    norms: int  # layer norms and QK-norms
    mlp: int  # dense MLP; 0 with experts
    router: int
    experts: int  # all of them

    @property
    def total(self) -> int:
        return self.attention + self.norms + self.mlp + self.router + self.experts


def layer_parameters(spec: ModelSpec) -> LayerParameters:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden_size * (q + 2 * kv) + q * spec.hidden_size
    if spec.qkv_bias:
        attention += q + 2 * kv
    norms = 2 * spec.hidden_size + (2 * spec.head_dim if spec.qk_norm else 0)
    if spec.moe is None:
        return LayerParameters(attention, norms, mlp=3 * spec.hidden_size * spec.ffn_size, router=0, experts=0)
    one_expert = 3 * spec.hidden_size * spec.moe.expert_ffn_size
    router = spec.hidden_size * spec.moe.experts
    return LayerParameters(attention, norms, mlp=0, router=router, experts=spec.moe.experts * one_expert)


def embedding_parameters(spec: ModelSpec) -> int:
    return spec.vocab_size * spec.hidden_size


def count_parameters(spec: ModelSpec) -> int:
    """Every weight of the HF checkpoint, a tied embedding once."""
    ends = embedding_parameters(spec) * (1 if spec.tied else 2) + spec.hidden_size
    return spec.layers * layer_parameters(spec).total + ends


def count_active_parameters(spec: ModelSpec) -> int:
    """The weights that one token meets: all of them, or with experts only the chosen ones."""
    if spec.moe is None:
        return count_parameters(spec)
    unused = spec.moe.experts - spec.moe.experts_per_token
    one_expert = layer_parameters(spec).experts // spec.moe.experts
    return count_parameters(spec) - spec.layers * unused * one_expert
