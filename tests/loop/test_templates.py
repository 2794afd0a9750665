"""What the model is asked is shown, and goes with the weights: from sft to a run on its folder, to the run's copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lens_megatron.evaluation.models import find_models
from lens_megatron.folder_note import NOTE, noted_template
from lens_megatron.model_spec import load_model_config
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import complaint, finished, rollouts, run_tree, write_run

TEMPLATE = "{problem} ="
ONE = {"parallel": {"tp": 1}}


def sft_folder(task: Path, folder: Path) -> tuple[Path, str]:
    """The HF folder of one supervised step under TEMPLATE, and what was printed."""
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    (folder / "sft.jsonl").write_text("".join(json.dumps({**row, "response": row["answer"]}) + "\n" for row in rows))
    data = {"train": str(folder / "sft.jsonl"), "prompts_per_step": 4, "template": TEMPLATE}
    tree = {"model": str(task / "model"), "run_dir": str(folder / "sft"), "steps": 1, "data": data}
    (folder / "SFT.yaml").write_text(yaml.safe_dump(tree))
    code, words = finished(folder, "sft", str(folder / "SFT.yaml"))
    assert code == 0, words
    return folder / "sft" / "hf", words


def lines(words: str, start: str) -> list[str]:
    return [line for line in words.splitlines() if line.startswith(start)]


@pytest.mark.long
def test_a_run_on_the_folder_of_an_sft_asks_as_it_did(task: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = sft_folder(task, tmp_path)
    (line,) = lines(words, "first prompt: ")
    assert line.endswith(" =' (template: data.template)")
    assert noted_template(model) == TEMPLATE
    assert AutoTokenizer.from_pretrained(model).chat_template  # it would have been guessed
    AutoModelForCausalLM.from_pretrained(model)

    run_dir = tmp_path / "run"
    tree = run_tree(task, run_dir, model=str(model), steps=1, checkpoint={"every": 0, "hf_every": 1}, **ONE)
    run = str(write_run(tmp_path, tree))
    code, words = finished(tmp_path, "train", run)
    assert code == 0, words
    (shown,) = lines(words, "first prompt: ")
    assert shown == line.replace("data.template", "lens_megatron.json of the model's folder")
    (preset,) = lines(words, "from preset lens: ")
    assert "update.minibatches=1" in preset and "optimizer.lr" not in preset  # which RUN.yaml gives
    rows = rollouts(run_dir, 1)
    pieces = "".join(rows[0].prompt_pieces)
    assert pieces.endswith("=") and "Question" not in pieces
    (closing,) = lines(words, "done: ")
    reward = RunFolder.open(run_dir).read_metrics()[-1]["reward"]
    assert closing == f"done: 1 step in {run_dir}, reward {reward:.3f}; see it: lens-megatron report {run_dir}"
    assert words.splitlines()[-1] == closing

    # and what the run leaves is asked alike, whatever becomes of the folder that it began with
    for folder in (run_dir / "hf" / "step_000001", run_dir / "checkpoints" / "step_000001" / "hf"):
        assert noted_template(folder) == TEMPLATE
    (model / NOTE).unlink()
    assert {one.template for one in find_models(str(run_dir)) if one.megatron} == {TEMPLATE}

    # a resumed run shows its prompts too; what the preset set is in its config.yaml
    code, words = finished(tmp_path, "train", "--resume", run, f"data.template='{TEMPLATE}'")
    assert code == 0, words
    assert lines(words, "first prompt: ") == [line] and not lines(words, "from preset ")
    assert "nothing is left to do" in words and not lines(words, "done: ")


@pytest.mark.long
def test_the_runs_own_template_is_noted_not_that_of_its_model(task: Path, tmp_path: Path) -> None:
    model, _ = sft_folder(task, tmp_path)
    tree = run_tree(task, tmp_path / "run", model=str(model), steps=1, checkpoint={"every": 0, "hf_every": 1}, **ONE)
    tree["data"]["template"] = "tiny-qwen3"  # a shipped one's
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 0, words
    assert lines(words, "first prompt: ")[0].endswith("(template: data.template, shipped with tiny-qwen3)")
    assert noted_template(tmp_path / "run" / "hf" / "step_000001") == load_model_config("tiny-qwen3").template
    assert {one.template for one in find_models(str(tmp_path / "run"))} == {load_model_config("tiny-qwen3").template}

    (model / NOTE).write_text('{"template": "{question}"}')
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, {**tree, "run_dir": str(tmp_path / "other")})))
    assert code == 2 and words.strip() == complaint(words)
    assert str(model / NOTE) in words and "'{question}'" in words
