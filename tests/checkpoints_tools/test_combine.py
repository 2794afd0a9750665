"""average and prune-optimizer, and what inspect says of the results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.hf_to_megatron import hf_to_megatron
from lens_megatron.cli import main
from lens_megatron.mcore.stored_dtypes import BY_NAME
from tests.tiny_models import save_hf

Folder = Callable[[str], Path]


def weights(folder: Path, tmp_path: Path) -> dict[str, Tensor]:
    assert main(["convert", "megatron-to-hf", str(folder), str(tmp_path / f"{folder.name}-hf")]) == 0
    return load_file(tmp_path / f"{folder.name}-hf" / "model.safetensors")


@pytest.fixture
def three(hf: Folder, tmp_path: Path) -> list[Path]:
    folders = []
    for seed in range(3):
        save_hf("qwen3_moe", tmp_path / f"hf{seed}", seed=seed)
        hf_to_megatron(tmp_path / f"hf{seed}", tmp_path / f"m{seed}", BY_NAME["bfloat16"], workers=2)
        folders.append(tmp_path / f"m{seed}")
    return folders


@pytest.mark.parametrize(("option", "shares"), [([], [1 / 3] * 3), (["--weights", "1,2,5"], [0.125, 0.25, 0.625])])
def test_average_is_the_mean(option: list[str], shares: list[float], three: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "mean"
    assert main(["convert", "average", *map(str, three), str(target), *option]) == 0
    parts = [weights(folder, tmp_path) for folder in three]
    for name, found in weights(target, tmp_path).items():
        mean = sum(part[name].double() * share for part, share in zip(parts, shares, strict=True))
        assert torch.equal(found, torch.as_tensor(mean).bfloat16()), name


def test_average_refuses_what_cannot_be_averaged(
    three: list[Path], converted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any) -> str:
        assert main(["convert", "average", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "holds another model" in refused(three[0], converted("qwen3"), tmp_path / "t")
    assert "at least two" in refused(three[0], tmp_path / "t")
    assert "2 numbers with a sum above 0" in refused(three[0], three[1], tmp_path / "t", "--weights", "1")
    assert "2 numbers with a sum above 0" in refused(three[0], three[1], tmp_path / "t", "--weights", "1,-1")
    assert not (tmp_path / "t").exists()


def test_nothing_to_prune(converted: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "prune-optimizer", str(converted("qwen3"))]) == 2
    assert "holds no optimizer" in capsys.readouterr().err


def test_inspect_shows_the_run_it_lies_in(
    converted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: tiny\nsteps: 3\n")
    shutil.copytree(converted("qwen3_moe"), run / "checkpoints" / "step_000003")
    assert main(["convert", "inspect", str(run), "--json", str(tmp_path / "i.json")]) == 0  # the newest one
    found = json.loads((tmp_path / "i.json").read_text())
    assert found["run_config"]["values"] == {"model": "tiny", "steps": 3}
    assert found["model"]["moe"] == {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 24}
    assert found["optimizer"] is False and found["whole"] and found["dtype"] == "float32"
    experts = found["tensors"]["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert experts["shape"] == [4, 8, 48, 32] and experts["dtype"] == "float32"
    assert found["parameters"] == 132_320
    said = capsys.readouterr().out
    assert "8 experts" in said and "132,320" in said and "config.yaml" in said


def test_inspect_shows_a_handful_of_metrics(
    converted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints" / "step_000003"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(converted("qwen3"), folder)
    metrics = {"loss": 1.5, "success": 0.5, "reward": 0.25, "eval/math500": 0.625}
    metrics |= {f"time/{number}": float(number) for number in range(90)}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "metrics": metrics}))
    for config, shown in (
        ("checkpoint: {keep_best: eval/math500}", ["reward", "success", "eval/math500", "metrics"]),
        ("checkpoint: {keep_best: reward}", ["reward", "success", "metrics"]),
        ("checkpoint: [1]", ["reward", "success", "metrics"]),
        ("- 1", ["reward", "success", "metrics"]),
    ):
        (run / "config.yaml").write_text(config)
        assert main(["convert", "inspect", str(folder), "--json", str(tmp_path / "i.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.split()[0] in {*metrics, "metrics"}] == shown
        (more,) = (line for line in lines if line.startswith("metrics "))
        assert more.split(maxsplit=1)[1] == f"{len(metrics) - len(shown) + 1} more, with --json F"
        assert json.loads((tmp_path / "i.json").read_text())["metrics"] == metrics


def test_inspect_an_hf_folder(hf: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(hf("qwen2"))]) == 0
    said = capsys.readouterr().out
    assert "35,264" in said and "tied" in said and "141,056" in said
