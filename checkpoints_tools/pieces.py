"""Which rows of HF tensors make up each tensor of a Megatron checkpoint, and the other way round.

A stored Megatron tensor has a layer axis, and for experts an expert axis, before its own: `lead` says where on them. All of
its rows are rows of HF tensors, so that converting is copying of row ranges: no tensor is ever needed whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lens_megatron.mcore.hf_names import hf_shapes, mapping_of
from lens_megatron.mcore.layout import padded_vocab_size
from lens_megatron.model_spec import ModelSpec


class Place(NamedTuple):
    """A tensor of a Megatron checkpoint, as its key and its place on the axes of layers and experts."""

    key: str
    lead: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}{list(self.lead) if self.lead else ''}"


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor of the source."""

    tensor: str | Place
    start: int
    stop: int


@dataclass(frozen=True)
class MegatronTensor:
    """One tensor at TP 1, and the HF rows that it is made of, in order; what they do not fill is zero."""

    place: Place
    lead_sizes: tuple[int, ...]
    shape: tuple[int, ...]  # without the leading axes
    pieces: tuple[Piece, ...]
    parts: int = 1  # records of equal size that training writes it as: 2 for gate above up


def megatron_tensors(spec: ModelSpec) -> Iterator[MegatronTensor]:
    """Every tensor that a model of this shape keeps in a checkpoint, under the names that training writes."""
    shapes = hf_shapes(spec)
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
    for name in names if spec.tied else [*names, "output_layer.weight"]:
        yield _tensor(spec, shapes, Place(name), (), name, None)
    for layer in range(spec.layers):
        for name in _layer_names(spec):
            yield _tensor(spec, shapes, Place(f"decoder.layers.{name}", (layer,)), (spec.layers,), name, layer)
        for expert in range(spec.moe.experts if spec.moe else 0):
            assert spec.moe is not None
            for part in ("linear_fc1", "linear_fc2"):
                place = Place(f"decoder.layers.mlp.experts.experts.{part}.weight", (layer, expert))
                name = f"mlp.experts.local_experts.{expert}.{part}.weight"
                yield _tensor(spec, shapes, place, (spec.layers, spec.moe.experts), name, layer)


def hf_pieces(spec: ModelSpec) -> dict[str, tuple[Piece, ...]]:
    """For every HF tensor the rows of Megatron tensors that it is made of, in order."""
    found: dict[str, list[tuple[int, Piece]]] = {name: [] for name in hf_shapes(spec)}
    for tensor in megatron_tensors(spec):
        row = 0
        for piece in tensor.pieces:
            assert isinstance(piece.tensor, str)
            rows = piece.stop - piece.start
            found[piece.tensor].append((piece.start, Piece(tensor.place, row, row + rows)))
            row += rows
    return {name: tuple(piece for _, piece in sorted(parts, key=lambda p: p[0])) for name, parts in found.items()}


def modules_with_state(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Linear layers whose `_extra_state` (empty without FP8) a loading model asks for: key, place, sizes of the axes."""
    dense = [] if spec.moe else ["mlp.linear_fc1", "mlp.linear_fc2"]
    for layer in range(spec.layers):
        for name in ("self_attention.linear_proj", "self_attention.linear_qkv", *dense):
            yield f"decoder.layers.{name}", (layer,), (spec.layers,)
        for expert in range(spec.moe.experts if spec.moe else 0):
            assert spec.moe is not None
            for name in ("linear_fc1", "linear_fc2"):
                sizes = (spec.layers, spec.moe.experts)
                yield f"decoder.layers.mlp.experts.experts.{name}", (layer, expert), sizes


def part_of(pieces: tuple[Piece, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """The pieces that make rows [start, stop) of what `pieces` make."""
    found, first = [], 0
    for piece in pieces:
        last = first + piece.stop - piece.start
        low, high = max(start, first), min(stop, last)
        if low < high:
            found.append(Piece(piece.tensor, piece.start + low - first, piece.start + high - first))
        first = last
    return tuple(found)


def _layer_names(spec: ModelSpec) -> list[str]:
    names = ["self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"]
    names += ["self_attention.linear_qkv.bias"] if spec.qkv_bias else []
    names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] if spec.qk_norm else []
    names += ["self_attention.linear_proj.weight", "mlp.linear_fc1.layer_norm_weight"]
    return names + (["mlp.router.weight"] if spec.moe else ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"])


def _tensor(
    spec: ModelSpec,
    shapes: dict[str, tuple[int, ...]],
    place: Place,
    lead_sizes: tuple[int, ...],
    name: str,
    layer: int | None,
) -> MegatronTensor:
    mapping = mapping_of(name, layer, spec)
    rows = [shapes[hf][0] for hf in mapping.hf_names]
    total = padded_vocab_size(spec, 1) if mapping.kind == "vocabulary" else sum(rows)
    if mapping.kind == "qkv":
        pieces = _interleaved(mapping.hf_names, rows, spec.kv_heads)
    else:
        pieces = tuple(Piece(hf, 0, count) for hf, count in zip(mapping.hf_names, rows, strict=True))
    parts = 2 if mapping.kind == "gate_up" else 1
    return MegatronTensor(place, lead_sizes, (total, *shapes[mapping.hf_names[0]][1:]), pieces, parts)


def _interleaved(names: tuple[str, ...], rows: list[int], groups: int) -> tuple[Piece, ...]:
    """q, k and v of the first key/value head, then of the second, ..."""
    return tuple(
        Piece(name, group * (count // groups), (group + 1) * (count // groups))
        for group in range(groups)
        for name, count in zip(names, rows, strict=True)
    )
