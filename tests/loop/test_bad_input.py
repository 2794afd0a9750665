"""What a user may get wrong: exit code 2, one line that says what and where, and nothing made or overwritten."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import cli
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import complaint, finished, run_tree, write_run

Change = Callable[[dict[str, Any], Path], None]


def _data(*lines: str) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        tree["data"]["train"] = str(folder / "rows.jsonl")

    return change


def _set(path: str, value: Any) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[last] = value

    return change


def _model_file(name: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        shutil.copytree(tree["model"], folder / "model")
        tree["model"] = str(folder / "model")
        file = folder / "model" / name
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))

    return change


def _more_words(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"] |= {f"word{i}": 200 + i for i in range(10)}


def _a_file_in_the_way(tree: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("")
    tree["run_dir"] = str(folder / "file" / "run")


def _without_weights(tree: dict[str, Any], folder: Path) -> None:
    shutil.copytree(tree["model"], folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tree["model"] = str(folder / "model")


def _experts_of_a_dense_model(tree: dict[str, Any], folder: Path) -> None:
    tree["rollout"] |= {"engine": "sglang", "routing_replay": True}


ROW = '{"prompt": "How many?", "answer": "1"}'
WRONG: dict[str, tuple[Change, list[str]]] = {
    "empty data": (_data(), ["rows.jsonl", "empty"]),
    "no answer": (_data(ROW, '{"prompt": "How many?"}'), ["rows.jsonl:2", "answer"]),
    "not JSON": (_data(ROW, ROW.replace("}", "")), ["rows.jsonl:2"]),
    "no data file": (_set("data.train", "/nowhere/rows.jsonl"), ["/nowhere/rows.jsonl"]),
    "few prompts": (_data(ROW), ["data.prompts_per_step"]),
    "all too long": (_set("data.max_prompt_tokens", 3), ["data.max_prompt_tokens"]),
    "tokenizer too large": (_model_file("tokenizer.json", _more_words), ["210", "112", "model"]),
    "no such model": (_set("model", "/nowhere/model"), ["/nowhere/model"]),
    "no weights": (_without_weights, ["safetensors"]),
    "run_dir not writable": (_a_file_in_the_way, ["run_dir", "cannot be written"]),
    "unknown key": (_set("rollout.schedul", "early"), ["rollout.schedul", "schedule"]),
    "unknown preset": (_set("algorithm", "lenss"), ["lenss", "lens"]),
    "no such layout": (_set("parallel.tp", 3), ["tp"]),
    "steps": (_set("steps", 0), ["steps"]),
    "a slip in keep_best": (_set("checkpoint.keep_best", "sucess"), ["checkpoint.keep_best", "did you mean 'success'"]),
    "no experts": (_experts_of_a_dense_model, ["rollout.routing_replay", "no experts"]),
    "reward function of another name": (
        _set("rewards.default.function", "loop_rewards:by_hsah"),
        ["loop_rewards has no function by_hsah"],
    ),
    "no reward function": (_set("rewards.default.function", "loop_rewards"), ["module:name"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_with_one_line(
    task: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # where its reward function is
    tree = run_tree(task, tmp_path / "run", parallel={"tp": 1})
    change, expected = WRONG[name]
    change(tree, tmp_path)
    assert cli.main(["train", str(write_run(tmp_path, tree))]) == 2
    errors = capfd.readouterr().err
    line = complaint(errors)
    assert line.startswith("error: ")
    assert errors.strip() == line
    for word in expected:
        assert word in line
    assert "Error(" not in line
    # and when it has been put right, the same command starts
    assert not RunFolder(tmp_path / "run").holds_run()


@pytest.mark.parametrize(
    ("command", "how", "expected"),
    [
        ("train", [], "already holds a run"),
        ("train", ["--resume"], "no run to resume"),
        ("train", ["--continue"], "/nowhere/rows.jsonl"),
        ("train", [], "/nowhere/rows.jsonl"),
        ("sft", [], "already holds a run"),
        ("sft", [], "/nowhere/rows.jsonl"),
    ],
)
def test_refused_before_workers_start(
    task: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    how: list[str],
    expected: str,
) -> None:
    def start(*_: object) -> int:
        raise AssertionError("workers were started")

    monkeypatch.setattr("lens_megatron.workers.run_workers", start)
    tree = run_tree(task, tmp_path / "run", parallel={"tp": 2})
    if command == "sft":
        tree = {key: tree[key] for key in ("model", "run_dir", "data", "parallel")}
    if "rows" in expected:
        tree["data"]["train"] = "/nowhere/rows.jsonl"
    if "already" in expected:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()
    assert cli.main([command, *how, str(write_run(tmp_path, tree))]) == 2
    assert expected in complaint(capfd.readouterr().err)


def test_rank_0_speaks_for_all(task: Path, tmp_path: Path) -> None:
    tree = run_tree(task, tmp_path / "run")
    change, expected = WRONG["no answer"]
    change(tree, tmp_path)
    began = time.monotonic()
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 2
    assert time.monotonic() - began < 180
    assert words.strip() == complaint(words)
    assert all(word in words for word in expected)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "left", ["config.yaml", "metrics.jsonl", "rollouts/step_000001.parquet", "checkpoints/step_1/x"]
)
def test_an_existing_run_is_not_touched(
    task: Path, tmp_path: Path, left: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / left).parent.mkdir(parents=True)
    (run_dir / left).write_text("precious")
    tree = run_tree(task, run_dir, parallel={"tp": 1})
    before = _contents(run_dir)
    assert cli.main(["train", str(write_run(tmp_path, tree))]) == 2
    line = complaint(capfd.readouterr().err)
    assert "already holds a run" in line
    assert "--resume" in line
    after = _contents(run_dir)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) <= {"run.lock"}


def test_nothing_to_resume(task: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = run_tree(task, tmp_path / "run", parallel={"tp": 1})
    assert cli.main(["train", "--resume", str(write_run(tmp_path, tree))]) == 2
    assert "no run to resume" in complaint(capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_refused_resume_leaves_the_run_as_it_was(task: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    saved = {"checkpoint": {"every": 1, "asynchronous": False}, "parallel": {"tp": 1}}
    run = str(write_run(tmp_path, run_tree(task, run_dir, **saved)))
    assert finished(tmp_path, "train", run)[0] == 0
    folder = RunFolder.open(run_dir)
    assert folder.read_ending() == ("done", "")
    shutil.rmtree(run_dir / "checkpoints" / "step_000002")  # resuming would make step 2 again
    before = {name: text for name, text in _contents(run_dir).items() if not name.startswith("logs/")}

    def refused(*changes: str) -> str:
        code, words = finished(tmp_path, "train", "--resume", run, *changes)
        assert code == 2, words
        after = {name: text for name, text in _contents(run_dir).items() if not name.startswith("logs/")}
        assert after == before
        return complaint(words)

    rows = (task / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[:-1]))
    assert "the prompts are not those of the checkpoint" in refused(f"data.train={tmp_path / 'fewer.jsonl'}")
    assert "algorithm.rescue.gamma was 0.1 and is 0.3" in refused("algorithm.rescue.gamma=0.3")

    code, words = finished(tmp_path, "train", "--resume", run, "optimizer.lr=0.001")
    assert code == 0, words
    assert "resumed with a change: optimizer.lr was 0.01 and is 0.001\n" in words
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    assert (run_dir / "config.1.yaml").exists()

    shutil.rmtree(run_dir / "checkpoints" / "step_000002")  # and fewer steps than the newest checkpoint has
    before = {name: text for name, text in _contents(run_dir).items() if not name.startswith("logs/")}
    code, words = finished(tmp_path, "train", "--resume", run, "optimizer.lr=0.5", "steps=1")
    assert code == 0 and "nothing is left to do, and the run's files stay" in words, words
    assert {name: text for name, text in _contents(run_dir).items() if not name.startswith("logs/")} == before
