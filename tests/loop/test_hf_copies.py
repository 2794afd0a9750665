"""A run's HF copies: what `convert` would make of its checkpoint, opened by transformers; and --continue where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lens_megatron.cli import main
from tests.loop.runs import finished, metrics, run_tree, write_run


@pytest.mark.long
def test_copies_of_a_queued_run_that_had_not_begun(task: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)  # as a launcher leaves it
    (run_dir / "hf" / "step_000001.partial").mkdir(parents=True)  # as a killed run leaves it
    tree = run_tree(task, run_dir, steps=3, checkpoint={"every": 0, "hf_every": 2, "hf_keep": 1})
    code, words = finished(tmp_path, "train", "--continue", str(write_run(tmp_path, tree)))
    assert code == 0, words
    assert f"{run_dir}: no checkpoint to resume from: starting with step 1" in words
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3]
    assert [path.name for path in (run_dir / "hf").iterdir()] == ["step_000003"]  # the last step's too; step 2's pruned

    copy, converted = run_dir / "hf" / "step_000003", tmp_path / "converted"
    assert main(["convert", "megatron-to-hf", str(run_dir), str(converted)]) == 0
    found, expected = load_file(copy / "model.safetensors"), load_file(converted / "model.safetensors")
    before = load_file(task / "model" / "model.safetensors")
    assert set(found) == set(expected) == set(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], before[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert torch.equal(model.state_dict()["model.norm.weight"], expected["model.norm.weight"])
    text = "How many apples?"
    again = AutoTokenizer.from_pretrained(copy)(text)["input_ids"]
    assert again == AutoTokenizer.from_pretrained(task / "model")(text)["input_ids"]
