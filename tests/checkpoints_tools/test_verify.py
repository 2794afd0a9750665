"""What verify sees: planted mapping errors that a round trip cannot see, a single bit, another configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools import megatron_to_hf as to_hf
from checkpoints_tools import pieces, sources
from checkpoints_tools.forward import states, weights_of
from checkpoints_tools.hf_to_megatron import hf_to_megatron
from checkpoints_tools.pieces import MegatronTensor, Piece
from checkpoints_tools.sources import open_source
from checkpoints_tools.verify import describe, verify
from lens_megatron.cli import main
from lens_megatron.model_spec import ModelSpec
from tests.tiny_models import KINDS

Folder = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_forward_equals_transformers(kind: str, hf: Folder, converted: Folder) -> None:
    from transformers import AutoModelForCausalLM

    tokens = [number * 37 % 125 for number in range(200)]
    model = AutoModelForCausalLM.from_pretrained(hf(kind), dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    for folder in (hf(kind), converted(kind)):
        *_, (name, logits) = states(weights_of(open_source(folder)), tokens)
        assert name == "logits"
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def test_equal_checkpoints_are_equal(hf: Folder, converted: Folder, tmp_path: Path) -> None:
    assert (
        main(["convert", "verify", str(hf("qwen3_moe")), str(converted("qwen3_moe")), "--json", str(tmp_path / "r")])
        == 0
    )
    result = json.loads((tmp_path / "r").read_text())
    assert result["equal"] and result["tensors"] == 135
    assert [one["after"] for one in result["logits"]["differences"]] == [
        "embedding", "layer 0", "layer 1", "layer 2", "layer 3", "logits"
    ]  # fmt: skip


def _qkv_one_after_another(tensor: MegatronTensor, spec: ModelSpec) -> MegatronTensor:
    """All of q, then k, then v: right only with a single key/value head."""
    if not tensor.place.key.endswith("linear_qkv.weight"):
        return tensor
    return replace(
        tensor, pieces=tuple(sorted(tensor.pieces, key=lambda p: ("qkv".index(str(p.tensor)[-13]), p.start)))
    )


def _up_before_gate(tensor: MegatronTensor, spec: ModelSpec) -> MegatronTensor:
    if "linear_fc1.weight" not in tensor.place.key:
        return tensor
    return replace(tensor, pieces=tensor.pieces[::-1])


def _interleaved_rope(tensor: MegatronTensor, spec: ModelSpec) -> MegatronTensor:
    """Rows of each q and k head in the order of the other RoPE convention."""
    if not tensor.place.key.endswith("linear_qkv.weight"):
        return tensor
    order = [row for low in range(spec.head_dim // 2) for row in (low, low + spec.head_dim // 2)]
    rows = []
    for piece in tensor.pieces:
        for head in range(piece.start, piece.stop, spec.head_dim):
            turned = range(spec.head_dim) if "v_proj" in str(piece.tensor) else order
            rows += [Piece(piece.tensor, head + row, head + row + 1) for row in turned]
    return replace(tensor, pieces=tuple(rows))


def _experts_shifted(tensor: MegatronTensor, spec: ModelSpec) -> MegatronTensor:
    if len(tensor.place.lead) != 2 or spec.moe is None:
        return tensor
    layer, expert = tensor.place.lead
    return replace(tensor, place=tensor.place._replace(lead=(layer, (expert + 1) % spec.moe.experts)))


@pytest.mark.parametrize("plant", [_qkv_one_after_another, _up_before_gate, _interleaved_rope, _experts_shifted])
def test_a_mapping_wrong_in_both_directions_is_caught(
    plant: Callable[[MegatronTensor, ModelSpec], MegatronTensor],
    hf: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from checkpoints_tools import megatron_target

    right = pieces.megatron_tensors
    for module in (pieces, sources, megatron_target):
        monkeypatch.setattr(module, "megatron_tensors", lambda spec: (plant(tensor, spec) for tensor in right(spec)))
    kind = "qwen3_moe" if plant in (_experts_shifted, _up_before_gate) else "qwen3"
    hf_to_megatron(hf(kind), tmp_path / "wrong", None, workers=2)
    to_hf.megatron_to_hf(tmp_path / "wrong", tmp_path / "back", None, workers=2)
    there, back = load_file(hf(kind) / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(there[name], back[name]) for name in there), "a round trip does not see it"
    assert main(["convert", "verify", str(hf(kind)), str(tmp_path / "wrong")]) == 1
    said = capsys.readouterr().out
    assert "part at layer 0" in said and "DIFFERENT" in said
    assert "values:" not in said


def test_a_transposed_weight_is_caught_even_where_shapes_allow_it(
    tmp_path: Path, converted: Folder, hf: Folder
) -> None:
    """o_proj is square in qwen2 here: its transpose in Megatron's file, told apart by logits and by bits."""
    source = sources.MegatronSource(converted("qwen2"))
    wrong = tmp_path / "wrong"
    shutil.copytree(converted("qwen2"), wrong)
    chunk = next(
        c for c in source.stored["decoder.layers.self_attention.linear_proj.weight"].chunks if c.offsets[0] == 2
    )
    place = pieces.Place("decoder.layers.self_attention.linear_proj.weight", (2,))
    weight = source.place_rows(place, 0, 32)
    assert weight.shape == (32, 32)
    record = source._found[chunk.file, chunk.offset]
    with (wrong / chunk.file).open("r+b") as file:
        file.seek(record.offset)
        file.write(weight.T.contiguous().numpy().tobytes())
    result = verify(hf("qwen2"), wrong, None, 1e-4)
    assert result["logits"]["parted_at"] == "layer 2"
    assert [one["name"] for one in result["values"]] == ["model.layers.2.self_attn.o_proj.weight"]


def edited(folder: Path, target: Path, name: str, edit: Callable[[Tensor], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_one_bit_is_a_difference(hf: Folder, converted: Folder, tmp_path: Path) -> None:
    def flip(tensor: Tensor) -> None:
        tensor.view(torch.int32)[3, 5] ^= 1  # the last bit of the mantissa

    name = "model.layers.1.mlp.down_proj.weight"
    other = edited(hf("qwen3"), tmp_path / "other", name, flip)
    result = verify(converted("qwen3"), other, None, 1e-4)
    assert not result["equal"]
    assert [(one["name"], one["differing"]) for one in result["values"]] == [(name, 1)]
    assert result["logits"]["parted_at"] is None  # too small to matter, and said so
    assert any(name in line for line in describe(result))


def test_a_sign_of_zero_and_nan_are_bits_too(hf: Folder, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    plus = edited(hf("qwen3"), tmp_path / "plus", name, lambda t: t[0, 0].fill_(0.0))
    minus = edited(hf("qwen3"), tmp_path / "minus", name, lambda t: t[0, 0].fill_(-0.0))
    assert not verify(plus, minus, None, 1e-4)["equal"]
    nan = edited(hf("qwen3"), tmp_path / "nan", name, lambda t: t[0, 0].fill_(float("nan")))
    assert verify(nan, nan, None, 1e-4, logits=False)["equal"]
    found = verify(plus, nan, None, 1e-4)
    assert found["logits"]["parted_at"] == "layer 1"
    json.dumps(found, allow_nan=False)


def test_configuration_counts(hf: Folder, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf("qwen3"), other)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    result = verify(hf("qwen3"), other, None, 1e-4)
    assert [one["key"] for one in result["config"]] == ["norm_eps"] and not result["values"]
    assert not result["equal"] and result["logits"]["parted_at"] == "layer 0"


def test_other_models_are_compared_by_names_and_shapes(hf: Folder) -> None:
    result = verify(hf("qwen3"), hf("qwen3_tied"), None, 1e-4)
    assert result["only_in_a"] == ["lm_head.weight"] and not result["equal"] and result["logits"] is None
