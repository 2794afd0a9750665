"""Bad input is one clear line and leaves nothing behind; a pickle that would run something is not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import index_writer
from lens_megatron.cli import main
from lens_megatron.mcore import checkpoint_index
from tests.checkpoints_tools.payloads import (
    planted_in_common,
    planted_in_index,
    resize_in_manifest,
    unpickle_carelessly,
)

Folder = Callable[[str], Path]


@pytest.fixture
def source(hf: Folder, tmp_path: Path) -> Path:
    shutil.copytree(hf("qwen3"), tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def checkpoint(converted: Folder, tmp_path: Path) -> Path:
    shutil.copytree(converted("qwen3"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: Any) -> str:
    """The one line on stderr."""
    assert main(["convert", *map(str, arguments)]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def config_with(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_off(source: Path) -> str:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "truncated"


def shard_missing(source: Path) -> str:
    names = load_file(source / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return "model-2.safetensors: missing"


def wrong_shape(source: Path) -> str:
    config_with(source, intermediate_size=64)
    return "config.json says (64, 32)"


def unknown_architecture(source: Path) -> str:
    config_with(source, model_type="gpt_neox")
    return "model_type 'gpt_neox' is not supported"


def pickle_only(source: Path) -> str:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    return "pytorch_model.bin is a pickle"


def pickle_in_disguise(source: Path) -> str:
    torch.save({"model.norm.weight": torch.ones(32)}, source / "model.safetensors")
    return "not a safetensors file"


def layer_too_many(source: Path) -> str:
    config_with(source, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return "tensor model.layers.3."


def tensor_missing(source: Path) -> str:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    return "no tensor model.layers.2.mlp.up_proj.weight"


def no_config(source: Path) -> str:
    (source / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize(
    "spoil",
    [cut_off, shard_missing, wrong_shape, unknown_architecture, pickle_only, pickle_in_disguise, layer_too_many,
     tensor_missing, no_config],
)  # fmt: skip
def test_bad_hf_folders(
    spoil: Callable[[Path], str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = spoil(source)
    assert expected in fails(capsys, 2, "hf-to-megatron", source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_existing_targets_are_not_touched(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "target").mkdir()
    assert "exists already" in fails(capsys, 2, "hf-to-megatron", source, tmp_path / "target")
    assert "exists already" in fails(capsys, 2, "megatron-to-hf", checkpoint, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_wrong_format_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "an HF folder; a Megatron checkpoint" in fails(capsys, 2, "megatron-to-hf", source, tmp_path / "target")
    assert "no such folder" in fails(capsys, 2, "inspect", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither an HF folder" in fails(capsys, 2, "verify", tmp_path / "empty", source)


def test_no_disk_space_is_found_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "the disk has 0 MiB free" in fails(capsys, 1, "hf-to-megatron", source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_disk_that_fills_up_is_said_and_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = os.pwrite, 0

    def full(handle: int, content: Any, offset: int) -> int:
        nonlocal written
        written += len(content)
        if written > 150_000:
            raise OSError(28, "No space left on device")
        return write(handle, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    said = fails(capsys, 1, "hf-to-megatron", source, tmp_path / "target")
    assert "No space left on device" in said and "it continues" in said
    assert not (tmp_path / "target").exists()
    monkeypatch.undo()
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "target")]) == 0
    assert main(["convert", "verify", str(source), str(tmp_path / "target"), "--no-logits"]) == 0


def test_two_at_once_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target.partial").mkdir()
    hold = (
        "import sys; from lens_megatron.files import take_lock\n"
        f"file = open({str(tmp_path / 'target.partial' / 'journal')!r}, 'w')\n"
        "print(take_lock(file), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert "another process is writing it" in fails(capsys, 2, "hf-to-megatron", source, tmp_path / "target")
        other.communicate()
    assert main(["convert", "hf-to-megatron", str(source), str(tmp_path / "target")]) == 0


@pytest.mark.parametrize("plant", [planted_in_index, planted_in_common])
def test_planted_payloads_are_not_run(
    plant: Callable[[Path, Path], str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = plant(checkpoint, tmp_path / "proof")
    assert expected in fails(capsys, 2, "inspect", checkpoint)
    if plant is planted_in_index:
        assert expected in fails(capsys, 2, "megatron-to-hf", checkpoint, tmp_path / "target")
        assert expected in fails(capsys, 2, "verify", checkpoint, checkpoint)
    assert not (tmp_path / "proof").exists()
    unpickle_carelessly(checkpoint, plant)
    assert (tmp_path / "proof").exists()  # the payload is a real one


def test_an_index_may_not_point_outside(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = checkpoint_index.read(checkpoint)
    text = index_writer.to_bytes(stored).replace(b"__0_0.distcp", b"../../secret")
    (checkpoint / ".metadata").write_bytes(text)
    resize_in_manifest(checkpoint, ".metadata")
    assert "outside the checkpoint" in fails(capsys, 2, "verify", checkpoint, checkpoint)


def test_damaged_checkpoints_are_said_to_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = checkpoint / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert "damaged: __0_0.distcp has" in fails(capsys, 2, "megatron-to-hf", checkpoint, tmp_path / "target")
    assert main(["convert", "inspect", str(checkpoint)]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    data.write_bytes(bytes(len(whole)))
    assert "no tensor archive" in fails(capsys, 2, "megatron-to-hf", checkpoint, tmp_path / "target")
    index = checkpoint / ".metadata"
    index.write_bytes(index.read_bytes()[:-40] + bytes(40))
    assert ".metadata: not readable" in fails(capsys, 2, "verify", checkpoint, checkpoint)
