"""Names and shapes: transformers' own, the local module tree's, and the tree that Transformer Engine's layers make.

A rank's tensors are shaped here by hand, from how Megatron-Core cuts them, not from the table that is tested.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_megatron.mcore.hf_bridge import _split_layer
from lens_megatron.mcore.hf_files import HfFolder
from lens_megatron.mcore.hf_names import Mapping, hf_shapes, mapping_of
from lens_megatron.mcore.hf_slices import join_shards, read_shard
from lens_megatron.mcore.layout import padded_vocab_size
from lens_megatron.model_spec import ModelSpec, load_model_spec, shipped_models
from lens_megatron.planning.parameters import count_parameters
from tests.tiny_models import KINDS, save_hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_hf(kind, tmp_path_factory.mktemp("hf") / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_that_transformers_saves(kind: str, folders: dict[str, Path]) -> None:
    source = HfFolder(folders[kind])
    shapes = hf_shapes(load_model_spec(folders[kind]))
    assert {name: source.shape(name) for name in source.names()} == shapes


@pytest.mark.parametrize("name", shipped_models())
def test_elements_are_the_parameters_counted_for_planning(name: str) -> None:
    spec = load_model_spec(name)
    if spec.layers > 8:  # a big model's list of experts has millions of characters; a layer is a layer
        spec = dataclasses.replace(spec, layers=3)
    assert sum(torch.Size(shape).numel() for shape in hf_shapes(spec).values()) == count_parameters(spec)


def add(tree: torch.nn.Module, path: str, tensor: Tensor | None, extra_state: bool = False) -> None:
    """A parameter (or an _extra_state buffer) at a dotted path, with modules on the way."""
    *modules, leaf = path.split(".")
    for name in modules:
        if not hasattr(tree, name):
            tree.add_module(name, torch.nn.Module())
        tree = getattr(tree, name)
    if extra_state:
        tree.register_buffer("_extra_state", torch.zeros(3))
    else:
        tree.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))


def rank_tree(spec: ModelSpec, engine: bool, tp: int, ep: int, etp: int) -> torch.nn.Module:
    """The parameters of one rank, unfilled: Transformer Engine's names, or the local spec's."""
    h, d = spec.hidden_size, spec.head_dim
    tree = torch.nn.Module()
    vocabulary = padded_vocab_size(spec, tp) // tp
    qkv_rows = (spec.heads + 2 * spec.kv_heads) * d // tp
    add(tree, "embedding.word_embeddings.weight", torch.zeros(vocabulary, h))
    for layer in range(spec.layers):

        def put(name: str, *shape: int, prefix: str = f"decoder.layers.{layer}.") -> None:
            add(tree, prefix + name, torch.zeros(*shape))
            if engine and "linear" in name:
                add(tree, prefix + name, None, extra_state=True)

        put("self_attention.linear_qkv.layer_norm_weight" if engine else "input_layernorm.weight", h)
        put("self_attention.linear_qkv.weight", qkv_rows, h)
        if spec.qkv_bias:
            put("self_attention.linear_qkv.bias", qkv_rows)
        if spec.qk_norm:
            put("self_attention.q_layernorm.weight", d)
            put("self_attention.k_layernorm.weight", d)
        put("self_attention.linear_proj.weight", h, spec.heads * d // tp)
        if spec.moe is None:
            put("mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight", h)
            put("mlp.linear_fc1.weight", 2 * spec.ffn_size // tp, h)
            put("mlp.linear_fc2.weight", h, spec.ffn_size // tp)
            continue
        # with experts the norm is not in front of a single linear layer, so Transformer Engine keeps it apart too
        put("pre_mlp_layernorm.weight", h)
        put("mlp.router.weight", spec.moe.experts, h)
        width = spec.moe.expert_ffn_size // etp
        for expert in range(spec.moe.experts // ep):
            if engine:
                put(f"mlp.experts.linear_fc1.weight{expert}", 2 * width, h)
                put(f"mlp.experts.linear_fc2.weight{expert}", h, width)
            else:
                put(f"mlp.experts.local_experts.{expert}.linear_fc1.weight", 2 * width, h)
                put(f"mlp.experts.local_experts.{expert}.linear_fc2.weight", h, width)
    add(tree, "decoder.final_layernorm.weight", torch.zeros(h))
    if not spec.tied:
        add(tree, "output_layer.weight", torch.zeros(vocabulary, h))
    return tree


CUTS = [(1, 1, 1), (2, 1, 2), (4, 1, 4), (1, 2, 1), (2, 2, 1), (2, 4, 2)]
COMBINATIONS = [
    (kind, *cut) for kind in KINDS for cut in CUTS if kind == "qwen3_moe" or (cut[1] == 1 and cut[2] == cut[0])
]


@pytest.mark.parametrize("engine", [True, False], ids=["transformer engine", "local"])
@pytest.mark.parametrize(("kind", "tp", "ep", "etp"), COMBINATIONS)
def test_round_trip(kind: str, tp: int, ep: int, etp: int, engine: bool, folders: dict[str, Path]) -> None:
    """Every HF tensor comes back bit for bit, exactly once, from the shards of all ranks."""
    spec = load_model_spec(folders[kind])
    source = HfFolder(folders[kind])
    layers = {layer: layer for layer in range(spec.layers)}
    shards: dict[Mapping, dict[int, Tensor]] = {}
    for expert_rank in range(ep):
        first = expert_rank * (spec.moe.experts // ep) if spec.moe else 0
        for rank in range(max(tp, etp)):
            tree = rank_tree(spec, engine, tp, ep, etp)
            assert not engine or any("_extra_state" in name for name, _ in tree.named_buffers())
            for name, parameter in tree.named_parameters():
                layer, inner = _split_layer(name, layers)
                mapping = mapping_of(inner, layer, spec, first)
                place, ranks = (rank % etp, etp) if mapping.expert is not None else (rank % tp, tp)
                shard = read_shard(mapping, spec, place, ranks, parameter.size(0), source.read)
                assert shard.shape == parameter.shape, name
                place = 0 if mapping.kind == "whole" else place
                before = shards.setdefault(mapping, {}).get(place)
                assert before is None or torch.equal(before, shard), "replicas are alike"
                shards[mapping][place] = shard
    found = [
        pair
        for mapping, parts in shards.items()
        for pair in join_shards(mapping, spec, [parts[n] for n in sorted(parts)])
    ]
    assert set(Counter(name for name, _ in found).values()) == {1}
    assert {name for name, _ in found} == set(hf_shapes(spec))
    for name, tensor in found:
        assert torch.equal(tensor, source.read(name)), name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_slices_read_are_only_those_of_the_rank(kind: str, folders: dict[str, Path]) -> None:
    """At tp 4 a rank reads a quarter of what is cut."""
    spec = load_model_spec(folders[kind])
    source = HfFolder(folders[kind])
    read = Counter[str]()

    def counted(name: str, dim: int | None, start: int, stop: int) -> Tensor:
        part = source.read(name, dim, start, stop)
        read[name] += part.numel()
        return part

    tree = rank_tree(spec, False, 4, 1, 4)
    for name, parameter in tree.named_parameters():
        layer, inner = _split_layer(name, {n: n for n in range(spec.layers)})
        read_shard(mapping_of(inner, layer, spec), spec, 1, 4, parameter.size(0), counted)
    for name, shape in hf_shapes(spec).items():
        whole = torch.Size(shape).numel()
        if "norm" in name:
            assert read[name] == whole
        elif "embed" in name or "lm_head" in name:
            assert read[name] == padded_vocab_size(spec, 4) // 4 * spec.hidden_size
        else:
            assert read[name] * 4 == whole, name


def test_padding_rows_are_zeros_and_never_exported(folders: dict[str, Path]) -> None:
    """125 words over 4 ranks of 32: the last holds 29 and 3 of padding. Over ranks of 128, whole ranks are padding."""
    spec = load_model_spec(folders["llama"])
    source = HfFolder(folders["llama"])
    mapping = mapping_of("output_layer.weight", None, spec)
    last = read_shard(mapping, spec, 3, 4, 32, source.read)
    assert last.shape == (32, 32)
    assert bool(last[:29].any())
    assert not last[29:].any()
    beyond = read_shard(mapping, spec, 1, 2, 128, source.read)
    assert beyond.shape == (128, 32)
    assert not beyond.any()
    assert mapping_of("output_layer.weight", None, dataclasses.replace(spec, tied=True)).hf_names == (
        "model.embed_tokens.weight",
    )


@pytest.mark.parametrize(
    "name",
    ["mlp.linear_fc3.weight", "mlp.experts.linear_fc1.weight", "mlp.experts.local_experts.x.linear_fc1.weight", "bias"],
)
def test_unknown_names_raise(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(KeyError):
        mapping_of(name, 0, load_model_spec(folders["llama"]))
    with pytest.raises(KeyError):
        mapping_of(name, None, load_model_spec(folders["llama"]))


def plain_logits(spec: ModelSpec, weight: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    """A dense model written out in Megatron-Core's arrangement of the weights: per group [q x n, k, v], [gate; up]."""
    groups, per_group, d = spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim
    x = weight["embedding.word_embeddings.weight"][tokens_T]
    count = len(tokens_T)
    angle = torch.arange(count)[:, None] * spec.rope_theta ** (-torch.arange(0, d, 2) / d)[None]
    cos, sin = (f(torch.cat([angle, angle], -1))[:, None] for f in (torch.cos, torch.sin))

    def norm(y: Tensor, name: str) -> Tensor:
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + spec.norm_eps) * weight[name]

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    mask = torch.full((count, count), -torch.inf).triu(1)
    for layer in range(spec.layers):
        p = f"decoder.layers.{layer}."
        qkv = norm(x, p + "input_layernorm.weight") @ weight[p + "self_attention.linear_qkv.weight"].t()
        q, k, v = qkv.view(count, groups, per_group + 2, d).split([per_group, 1, 1], dim=2)
        q = turned(norm(q.reshape(count, -1, d), p + "self_attention.q_layernorm.weight"))
        k = turned(norm(k.reshape(count, -1, d), p + "self_attention.k_layernorm.weight"))
        k, v = (y.reshape(count, -1, d).repeat_interleave(per_group, 1) for y in (k, v))
        attention = (torch.einsum("qhd,khd->hqk", q, k) / d**0.5 + mask).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", attention, v).reshape(count, -1)
        x = x + mixed @ weight[p + "self_attention.linear_proj.weight"].t()
        gate, up = (norm(x, p + "pre_mlp_layernorm.weight") @ weight[p + "mlp.linear_fc1.weight"].t()).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ weight[p + "mlp.linear_fc2.weight"].t()
    return norm(x, "decoder.final_layernorm.weight") @ weight["output_layer.weight"][: spec.vocab_size].t()


PLANTED: dict[str, Any] = {
    "none": lambda name, weight: weight,
    "gate and up swapped": lambda name, weight: weight.roll(weight.size(0) // 2, 0) if "fc1" in name else weight,
    "qkv not by groups": lambda name, weight: (
        torch.cat([weight.view(4, 4, 16, -1)[:, s].reshape(-1, weight.size(1)) for s in (slice(2), [2], [3])])
        if "linear_qkv" in name
        else weight
    ),
    "heads of a group swapped": lambda name, weight: (
        weight.view(4, 4, 16, -1)[:, [1, 0, 2, 3]].reshape_as(weight) if "linear_qkv" in name else weight
    ),
    "rope interleaved": lambda name, weight: (
        weight.view(-1, 8, 2, weight.size(1)).transpose(1, 2).reshape_as(weight) if "linear_qkv" in name else weight
    ),
    "k and v swapped": lambda name, weight: (
        weight.view(4, 4, 16, -1)[:, [0, 1, 3, 2]].reshape_as(weight) if "linear_qkv" in name else weight
    ),
    "a norm reversed": lambda name, weight: weight.flip(0) if name.endswith("pre_mlp_layernorm.weight") else weight,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_logits_show_a_wrong_arrangement_that_a_round_trip_would_not(planted: str, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    spec = load_model_spec(folders["qwen3"])
    source = HfFolder(folders["qwen3"])
    weights = {}
    for name, parameter in rank_tree(spec, False, 1, 1, 1).named_parameters():
        layer, inner = _split_layer(name, {n: n for n in range(spec.layers)})
        weight = read_shard(mapping_of(inner, layer, spec), spec, 0, 1, parameter.size(0), source.read)
        weights[name] = PLANTED[planted](name, weight)
    tokens = torch.randint(0, spec.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folders["qwen3"], dtype=torch.float32)(tokens[None]).logits[0]
        error = float((plain_logits(spec, weights, tokens) - expected).abs().max())
    assert error < 1e-4 if planted == "none" else error > 1e-2
