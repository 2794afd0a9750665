"""The model in plain torch, one layer in memory at a time, to compare checkpoints by what they compute.

It shares no table of names with the converters: each format is read here by what its own trainer means by it (HF: q, k, v
and gate, up by name; Megatron: per key/value head q.. k v, gate above up). So a mapping that is wrong the same way in both
directions, which a round trip cannot see, is seen here.

Shapes: T tokens, H hidden, N query heads, G key/value heads, D head, F ffn, V vocabulary, E experts, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_tools.pieces import Place
from checkpoints_tools.sources import HfSource, MegatronSource
from lens_megatron.model_spec import ModelSpec

_HEAD_ROWS = 8192
Mlp = tuple[Tensor, Tensor, Tensor]  # gate_FH, up_FH, down_HF


@dataclass(frozen=True)
class LayerWeights:
    """One layer, float32. Without biases the three are None, without q/k norms the two."""

    attention_norm_H: Tensor
    q_NDH: Tensor
    k_GDH: Tensor
    v_GDH: Tensor
    q_bias_ND: Tensor | None
    k_bias_GD: Tensor | None
    v_bias_GD: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    out_HX: Tensor  # X = N x D
    mlp_norm_H: Tensor
    router_EH: Tensor | None
    mlp: Callable[[int], Mlp]  # the dense one whatever the number, or that expert


@dataclass(frozen=True)
class Weights:
    spec: ModelSpec
    embedding: Callable[[int, int], Tensor]  # rows [start, stop)
    layer: Callable[[int], LayerWeights]
    final_norm: Callable[[], Tensor]
    head: Callable[[int, int], Tensor]  # rows


def weights_of(source: HfSource | MegatronSource) -> Weights:
    return _hf_weights(source) if isinstance(source, HfSource) else _megatron_weights(source)


def _hf_weights(source: HfSource) -> Weights:
    spec = source.spec

    def whole(name: str) -> Tensor:
        return source.rows(name, 0, source.shapes[name][0]).float()

    def layer(number: int) -> LayerWeights:
        at = f"model.layers.{number}."

        def heads(letter: str, kind: str) -> Tensor:
            return whole(f"{at}self_attn.{letter}_proj.{kind}").unflatten(0, (-1, spec.head_dim))

        def mlp(expert: int) -> Mlp:
            middle = f"mlp.experts.{expert}." if spec.moe else "mlp."
            gate, up, down = (whole(f"{at}{middle}{part}_proj.weight") for part in ("gate", "up", "down"))
            return gate, up, down

        biased, normed = spec.qkv_bias, spec.qk_norm
        return LayerWeights(
            attention_norm_H=whole(at + "input_layernorm.weight"),
            q_NDH=heads("q", "weight"),
            k_GDH=heads("k", "weight"),
            v_GDH=heads("v", "weight"),
            q_bias_ND=heads("q", "bias") if biased else None,
            k_bias_GD=heads("k", "bias") if biased else None,
            v_bias_GD=heads("v", "bias") if biased else None,
            q_norm_D=whole(at + "self_attn.q_norm.weight") if normed else None,
            k_norm_D=whole(at + "self_attn.k_norm.weight") if normed else None,
            out_HX=whole(at + "self_attn.o_proj.weight"),
            mlp_norm_H=whole(at + "post_attention_layernorm.weight"),
            router_EH=whole(at + "mlp.gate.weight") if spec.moe else None,
            mlp=mlp,
        )

    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    return Weights(
        spec,
        embedding=lambda start, stop: source.rows(embedding, start, stop).float(),
        layer=layer,
        final_norm=lambda: whole("model.norm.weight"),
        head=lambda start, stop: source.rows(embedding if spec.tied else head, start, stop).float(),
    )


def _megatron_weights(source: MegatronSource) -> Weights:
    spec = source.spec
    group = spec.heads // spec.kv_heads

    def rows(key: str, lead: tuple[int, ...], start: int, stop: int) -> Tensor:
        return source.place_rows(Place(key, lead), start, stop).float()

    def whole(key: str, *lead: int) -> Tensor:
        return rows(key, lead, 0, source.stored[key].shape[len(lead)])

    def layer(number: int) -> LayerWeights:
        attention, block = "decoder.layers.self_attention.", "decoder.layers.mlp."

        def split(kind: str) -> tuple[Tensor, Tensor, Tensor]:
            """[G, q.. k v, D, ...] -> q, k, v."""
            stacked = whole(f"{attention}linear_qkv.{kind}", number).unflatten(0, (spec.kv_heads, group + 2, -1))
            return stacked[:, :group].flatten(0, 1), stacked[:, group], stacked[:, group + 1]

        def mlp(expert: int) -> Mlp:
            middle, lead = ("experts.experts.", (number, expert)) if spec.moe else ("", (number,))
            gate, up = whole(f"{block}{middle}linear_fc1.weight", *lead).chunk(2)
            return gate, up, whole(f"{block}{middle}linear_fc2.weight", *lead)

        q, k, v = split("weight")
        q_bias, k_bias, v_bias = split("bias") if spec.qkv_bias else (None, None, None)
        return LayerWeights(
            attention_norm_H=whole(attention + "linear_qkv.layer_norm_weight", number),
            q_NDH=q,
            k_GDH=k,
            v_GDH=v,
            q_bias_ND=q_bias,
            k_bias_GD=k_bias,
            v_bias_GD=v_bias,
            q_norm_D=whole(attention + "q_layernorm.weight", number) if spec.qk_norm else None,
            k_norm_D=whole(attention + "k_layernorm.weight", number) if spec.qk_norm else None,
            out_HX=whole(attention + "linear_proj.weight", number),
            mlp_norm_H=whole(block + "linear_fc1.layer_norm_weight", number),
            router_EH=whole(block + "router.weight", number) if spec.moe else None,
            mlp=mlp,
        )

    embedding = "embedding.word_embeddings.weight"
    head = embedding if spec.tied else "output_layer.weight"
    return Weights(
        spec,
        embedding=lambda start, stop: rows(embedding, (), start, stop),
        layer=layer,
        final_norm=lambda: whole("decoder.final_layernorm.weight"),
        head=lambda start, stop: rows(head, (), start, stop),
    )


@torch.no_grad()
def states(
    weights: Weights, tokens_T: list[int], note_experts: Callable[[Tensor], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The hidden states after the embedding and each layer, [T, H]; last the logits, [T, V]. `note_experts` gets [T, K] of
    each layer of a mixture."""
    spec = weights.spec
    hidden_TH = torch.cat([weights.embedding(token, token + 1) for token in tokens_T])
    yield "embedding", hidden_TH
    cos_TD, sin_TD = _rope(spec, len(tokens_T))
    for number in range(spec.layers):
        layer = weights.layer(number)
        normed_TH = _norm(hidden_TH, layer.attention_norm_H, spec.norm_eps)
        hidden_TH = hidden_TH + _attention(layer, normed_TH, cos_TD, sin_TD, spec.norm_eps)
        normed_TH = _norm(hidden_TH, layer.mlp_norm_H, spec.norm_eps)
        hidden_TH = hidden_TH + _mlp(layer, normed_TH, spec, note_experts)
        yield f"layer {number}", hidden_TH
    hidden_TH = _norm(hidden_TH, weights.final_norm(), spec.norm_eps)
    starts = range(0, spec.vocab_size, _HEAD_ROWS)
    yield "logits", torch.cat([hidden_TH @ weights.head(s, min(s + _HEAD_ROWS, spec.vocab_size)).T for s in starts], 1)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rope(spec: ModelSpec, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, the same half twice."""
    half = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    frequency = spec.rope_theta**-half
    if spec.rope_scaling is not None:
        s = spec.rope_scaling
        # turns within the original context: few turns are slowed by `factor`, many are left, between is a blend
        turns = s.original_max_positions * frequency / (2 * math.pi)
        share = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = frequency * (share + (1 - share) / s.factor)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle_TD = torch.cat([angle, angle], dim=-1)
    return angle_TD.cos().float(), angle_TD.sin().float()


def _rotate(x_NTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    first, second = x_NTD.chunk(2, dim=-1)
    return x_NTD * cos_TD + torch.cat([-second, first], dim=-1) * sin_TD


def _attention(layer: LayerWeights, x_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float) -> Tensor:
    def heads(weight: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        out = torch.einsum("th,ndh->ntd", x_TH, weight)
        out = out if bias is None else out + bias[:, None]
        return out if norm is None else _norm(out, norm, eps)

    q_NTD = _rotate(heads(layer.q_NDH, layer.q_bias_ND, layer.q_norm_D), cos_TD, sin_TD)
    k_GTD = _rotate(heads(layer.k_GDH, layer.k_bias_GD, layer.k_norm_D), cos_TD, sin_TD)
    v_GTD = heads(layer.v_GDH, layer.v_bias_GD, None)
    repeat = q_NTD.size(0) // k_GTD.size(0)
    k_NTD, v_NTD = k_GTD.repeat_interleave(repeat, 0), v_GTD.repeat_interleave(repeat, 0)
    scores_NTT = q_NTD @ k_NTD.transpose(1, 2) / math.sqrt(q_NTD.size(-1))
    future_TT = torch.ones(scores_NTT.shape[1:], dtype=torch.bool).triu(1)
    mixed_NTD = scores_NTT.masked_fill(future_TT, -math.inf).softmax(-1) @ v_NTD
    return mixed_NTD.transpose(0, 1).flatten(1) @ layer.out_HX.T


def _mlp(layer: LayerWeights, x_TH: Tensor, spec: ModelSpec, note_experts: Callable[[Tensor], None] | None) -> Tensor:
    if spec.moe is None or layer.router_EH is None:
        return _swiglu(x_TH, layer.mlp(0))
    top = (x_TH @ layer.router_EH.T).topk(spec.moe.experts_per_token)
    share_TK = top.values.softmax(-1)  # over the chosen ones
    if note_experts is not None:
        note_experts(top.indices)
    out_TH = torch.zeros_like(x_TH)
    for expert in top.indices.unique().tolist():
        token, slot = (top.indices == expert).nonzero(as_tuple=True)
        out_TH[token] += share_TK[token, slot, None] * _swiglu(x_TH[token], layer.mlp(expert))
    return out_TH


def _swiglu(x_TH: Tensor, mlp: Mlp) -> Tensor:
    gate_FH, up_FH, down_HF = mlp
    return (F.silu(x_TH @ gate_FH.T) * (x_TH @ up_FH.T)) @ down_HF.T
