"""Converted checkpoints load in every layout of a real Megatron model, and its own checkpoints become right HF folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lens_megatron.cli import main
from lens_megatron.mcore.layout import ParallelConfig
from tests.checkpoints_tools import layout_cases as cases
from tests.tiny_models import save_hf

Folder = Callable[[str], Path]
# four processes each; what the layout leaves is data parallel
LOADS = [
    ("qwen3", ParallelConfig()),
    ("qwen3_tied", ParallelConfig(tp=2)),
    ("qwen2", ParallelConfig(pp=2)),
    ("llama", ParallelConfig(tp=2, pp=2)),
    ("qwen3_tied", ParallelConfig(tp=2, pp=2)),
    ("qwen3_moe", ParallelConfig(ep=2)),
    ("qwen3_moe", ParallelConfig(tp=2, pp=2)),
]
SAVES = [("qwen3_tied", ParallelConfig(tp=2, pp=2)), ("qwen3_moe", ParallelConfig(tp=2, ep=2))]


def named(pairs: list[tuple[str, ParallelConfig]]) -> list[str]:
    return [f"{kind} tp{layout.tp} pp{layout.pp} ep{layout.ep}" for kind, layout in pairs]


def transformers_logprobs(folder: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for sequence in cases.SEQUENCES:
            logprobs = model(sequence[None]).logits[0].log_softmax(-1)
            found.append(logprobs[:-1].gather(1, sequence[1:, None])[:, 0])
    return found


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("kind", "layout"), LOADS, ids=named(LOADS))
def test_converted_checkpoints_load(
    kind: str, layout: ParallelConfig, hf: Folder, converted: Folder, tmp_path: Path, four_workers: Any
) -> None:
    other = save_hf(kind, tmp_path / "other", seed=9)  # what is not loaded stays wrong
    answers = four_workers.run(cases.loaded, other, converted(kind), layout)
    assert_same_tensors(answers[0][0], load_file(hf(kind) / "model.safetensors"))
    expected = transformers_logprobs(hf(kind))
    for _, logprobs, extra in answers:
        assert extra == {}
        for found, wanted in zip(logprobs, expected, strict=True):
            torch.testing.assert_close(found[1:], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "layout"), SAVES, ids=named(SAVES))
def test_training_checkpoints_become_hf_folders(
    kind: str, layout: ParallelConfig, hf: Folder, tmp_path: Path, four_workers: Any
) -> None:
    saved = tmp_path / "step_000002"
    answers = four_workers.run(cases.trained, hf(kind), saved, layout)
    exported, logprobs = answers[0]
    assert main(["convert", "megatron-to-hf", str(saved), str(tmp_path / "hf")]) == 0
    assert_same_tensors(load_file(tmp_path / "hf" / "model.safetensors"), exported)
    assert not torch.equal(
        exported["model.norm.weight"], load_file(hf(kind) / "model.safetensors")["model.norm.weight"]
    )
    for found, wanted in zip(logprobs, transformers_logprobs(tmp_path / "hf"), strict=True):
        torch.testing.assert_close(found[1:], wanted, rtol=0, atol=2e-5)
    assert main(["convert", "verify", str(tmp_path / "hf"), str(saved)]) == 0

    # without its optimizer: smaller, the same weights, and it still loads in another layout
    pruned = tmp_path / "step_000003"
    shutil.copytree(saved, pruned)
    before = sum(path.stat().st_size for path in pruned.iterdir() if path.suffix == ".distcp")
    assert main(["convert", "prune-optimizer", str(pruned)]) == 0
    after = sum(path.stat().st_size for path in pruned.iterdir() if path.suffix == ".distcp")
    assert after < before / 2
    again = four_workers.run(cases.loaded, hf(kind), pruned, ParallelConfig(pp=2))
    assert_same_tensors(again[0][0], exported)
    assert again[0][2] == {"position": 7}
    assert not (tmp_path / "step_000003.partial").exists()
