"""HF -> Megatron -> HF: the same bits for every family, and what transformers computes from the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools import streaming
from checkpoints_tools.hf_to_megatron import hf_to_megatron
from checkpoints_tools.megatron_to_hf import megatron_to_hf
from checkpoints_tools.pieces import Place, hf_pieces, megatron_tensors
from checkpoints_tools.sources import MegatronSource
from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.mcore.stored_dtypes import BY_NAME
from lens_megatron.model_spec import ModelSpec, MoESpec
from tests.tiny_models import KINDS

Folder = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_has_the_same_bits_and_logits(
    kind: str, hf: Folder, converted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1000)  # tensors of this size then take several blocks
    megatron_to_hf(converted(kind), tmp_path / "back", None, workers=3)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf(kind)))
    tokens = torch.arange(200)[None] * 37 % 125
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        for folder in (tmp_path / "back", hf(kind))
    ]
    for _, info in models:
        assert not info["missing_keys"] and not info["unexpected_keys"]
    logits = [model(tokens).logits for model, _ in models]
    assert torch.equal(logits[0], logits[1])


def test_short_reads_and_writes_are_gone_on_with(hf: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network file system, or at a signal."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, buffers, place: read(file, [buffers[0][:777]], place))
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: write(file, content[:500], place))
    hf_to_megatron(hf("qwen3_moe"), tmp_path / "there", None, workers=2)
    megatron_to_hf(tmp_path / "there", tmp_path / "back", None, workers=2)
    monkeypatch.undo()
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf("qwen3_moe")))


def test_conversion_imports_no_torch(hf: Folder, tmp_path: Path) -> None:
    """Its import takes longer than copying a small model."""
    code = (
        "import sys; from lens_megatron.cli import main; there, back = sys.argv[2:]; "
        "assert main(['convert', 'hf-to-megatron', sys.argv[1], there]) == 0; "
        "assert main(['convert', 'megatron-to-hf', there, back]) == 0; "
        "raise SystemExit(str([m for m in ('torch', 'megatron', 'transformers', 'safetensors') if m in sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(hf("qwen3_moe")), str(tmp_path / "there"), str(tmp_path / "back")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip() == "[]"
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(hf("qwen3_moe")))


def test_shards_in_and_out(hf: Folder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(hf("qwen3")).save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    (source / "tokenizer.json").write_text("{}")
    hf_to_megatron(source, tmp_path / "megatron", None, workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, workers=2, shard_bytes=80_000)
    back = tmp_path / "back"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 3
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    for name, file in index["weight_map"].items():
        assert name in load_file(back / file)
    expected = tensors_of(hf("qwen3"))
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert_same_bits(tensors_of(back), expected)
    assert AutoModelForCausalLM.from_pretrained(back).config.num_hidden_layers == 4
    for name in ("tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_dtype_is_converted_in_weights_and_config(hf: Folder, converted: Folder, tmp_path: Path) -> None:
    hf_to_megatron(hf("qwen2"), tmp_path / "bf16", BY_NAME["bfloat16"], workers=2)
    assert MegatronSource(tmp_path / "bf16").manifest.dtype == "bfloat16"
    megatron_to_hf(tmp_path / "bf16", tmp_path / "back", None, workers=2)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(hf("qwen2")).items()}
    assert_same_bits(tensors_of(tmp_path / "back"), rounded)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    megatron_to_hf(converted("qwen2"), tmp_path / "half", BY_NAME["float16"], workers=2)
    assert_same_bits(tensors_of(tmp_path / "half"), {n: t.half() for n, t in tensors_of(hf("qwen2")).items()})


def change(folder: Path, target: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_mixed_dtypes_survive_unless_one_tensor_would_need_two(hf: Folder, tmp_path: Path) -> None:
    def norms_in_float32(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if "norm" in name else tensor.bfloat16()

    mixed = change(hf("qwen3"), tmp_path / "mixed", norms_in_float32)
    hf_to_megatron(mixed, tmp_path / "megatron", None, workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, workers=2)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(mixed))

    def one_half(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].half()

    split = change(hf("qwen3"), tmp_path / "split", one_half)
    with pytest.raises(UsageError, match=r"linear_qkv.weight are float16 and float32; give one with --dtype"):
        hf_to_megatron(split, tmp_path / "refused", None, workers=2)
    hf_to_megatron(split, tmp_path / "accepted", BY_NAME["float32"], workers=2)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe"]))
    kv_heads = draw(st.integers(1, 4))
    moe = MoESpec(draw(st.integers(2, 5)), 2, draw(st.integers(1, 9))) if family == "qwen3_moe" else None
    return ModelSpec(
        family=family, layers=draw(st.integers(1, 3)), hidden_size=draw(st.integers(1, 9)), ffn_size=draw(st.integers(1, 9)),
        heads=kv_heads * draw(st.integers(1, 4)), kv_heads=kv_heads, head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)), norm_eps=1e-6, rope_theta=1e4, max_positions=64, tied=draw(st.booleans()),
        qkv_bias=family == "qwen2", qk_norm=family in ("qwen3", "qwen3_moe"), moe=moe,
    )  # fmt: skip


def assembled(pieces: Any, tensors: dict[Any, Tensor]) -> Tensor:
    return torch.cat([tensors[piece.tensor][piece.start : piece.stop] for piece in pieces])


@given(specs())
def test_every_row_has_one_place_in_each_format(spec: ModelSpec) -> None:
    """Rows carry their own number; a reference that reshapes whole tensors says where they go."""
    number = 0
    tensors: dict[Any, Tensor] = {}
    for name, shape in hf_shapes(spec).items():
        tensors[name] = torch.arange(number, number + shape[0])
        number += shape[0]
    megatron: dict[Any, Tensor] = {}
    for entry in megatron_tensors(spec):
        rows = assembled(entry.pieces, tensors)
        megatron[entry.place] = torch.cat([rows, rows.new_full((entry.shape[0] - len(rows),), -1)])
    for layer in range(spec.layers):
        q, k, v = (
            tensors[f"model.layers.{layer}.self_attn.{x}_proj.weight"].reshape(spec.kv_heads, -1, spec.head_dim)
            for x in "qkv"
        )
        fused = torch.cat([q, k, v], dim=1).flatten()
        assert torch.equal(megatron[Place("decoder.layers.self_attention.linear_qkv.weight", (layer,))], fused)
    back = {name: assembled(pieces, megatron) for name, pieces in hf_pieces(spec).items()}
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert sum((rows >= 0).sum() for rows in megatron.values()) == number  # none twice
