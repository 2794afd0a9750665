"""`lens-megatron eval`: a whole row from one command, killed in the middle and run again, and what it leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lens_megatron import checkpoints, cli
from lens_megatron.evaluation.benchmarks import BENCHMARKS
from tests.data.tokenizers import byte_level
from tests.evaluation.small_benchmarks import write_benchmarks
from tests.test_score import save_model

PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("eval")
    save_model(root / "model", len(byte_level(root / "model")) + 7)
    data = write_benchmarks(root / "data")
    shorter = ["max_response_tokens=12", "slots=16", "rewards.workers=1"]
    return ["eval", str(root / "model"), "--benchmarks", "all", "--data", str(data), "--limit", "12", *shorter]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert cli.main([*words, "--out", str(out), "--json", str(out / "copy.json")]) == 0
    return out


def lines_of(out: Path) -> list[str]:
    return (next((out / "answers").glob("*.jsonl"))).read_text().splitlines()


def test_one_command_gives_the_row(whole: Path) -> None:
    answers = [json.loads(line) for line in lines_of(whole)[1:]]
    samples = {benchmark.name: benchmark.samples for benchmark in BENCHMARKS.values()}
    for name, k in samples.items():
        assert sum(answer["set"] == name for answer in answers) == 12 * k
    tree = json.loads((whole / "results.json").read_text())
    assert tree == json.loads((whole / "copy.json").read_text())
    (model,) = tree["models"]
    assert {name: one["samples"] for name, one in model["benchmarks"].items()} == samples
    for name, one in model["benchmarks"].items():
        mine = [answer["reward"] for answer in answers if answer["set"] == name]
        assert one["average"] == pytest.approx(sum(mine) / len(mine))
    assert "Average@16" in (whole / "table.md").read_text() and "Average@16" in (whole / "table.tex").read_text()


def test_killed_and_run_again_it_generates_nothing_twice(words: list[str], whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lens_megatron.cli", *words, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not any((tmp_path / "answers").glob("*.jsonl")) or len(lines_of(tmp_path)) < 40:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [line for line in lines_of(tmp_path)[1:] if line.endswith("}")]
    assert 30 < len(kept) < len(lines_of(whole)) - 50  # in the middle
    again = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "answers are there already" in again.stderr
    (shown,) = [line for line in again.stderr.splitlines() if line.startswith("first prompt: ")]
    assert shown.endswith("(template: the tokenizer's chat template)") and "<|im_start|>assistant" in shown
    now = lines_of(tmp_path)
    assert set(kept) <= set(now) and sorted(now) == sorted(lines_of(whole))  # each once, and the same words
    assert (tmp_path / "results.json").read_text() == (whole / "results.json").read_text()


def test_what_cannot_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*more: str) -> str:
        assert cli.main(["eval", *more]) == 2
        return capsys.readouterr().err

    assert "engine is embedded, sglang or http" in complaint("x", "--benchmarks", "all", "--engine", "vllm")
    assert "unknown key 'temprature'; did you mean 'temperature'?" in complaint(
        "x", "--benchmarks", "all", "temprature=1"
    )
    assert "give all, or some of them" in complaint("x", "--benchmarks", ",")
    assert "its folder does not exist" in complaint(
        "x", "--benchmarks", "all", "--json", str(tmp_path / "a" / "b.json")
    )
    assert "not a shipped model" in complaint(str(tmp_path / "none"), "--benchmarks", "all")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: nowhere\n")
    assert "no whole checkpoint" in complaint(str(tmp_path / "run"), "--benchmarks", "all")


@pytest.mark.parametrize("given", [[], ["rewards.workers=1"], ["rewards.default.kind=exact"]])
def test_files_are_judged_as_the_run_judged_them(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = tmp_path / "run", []
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"rewards": {"default": {"kind": "numeric"}, "seconds": 1.5}}))
    (run / "checkpoints" / "step_000001" / checkpoints.MANIFEST).write_text("{}")
    monkeypatch.setattr("lens_megatron.evaluation.models.find_models", lambda model: [SimpleNamespace(name="m")])
    monkeypatch.setattr(
        "lens_megatron.evaluation.evaluate.evaluate", lambda models, config, out: seen.append(config.rewards) or []
    )
    monkeypatch.setattr("lens_megatron.commands.eval._show", lambda results, out: None)
    for model in (run, run / "checkpoints" / "step_000001"):
        assert cli.main(["eval", str(model), "--benchmarks", "math500", *given]) == 0
    for rewards in seen:
        assert rewards.seconds == 1.5
        assert rewards.default.kind == ("exact" if "rewards.default.kind=exact" in given else "numeric")
    assert len(seen) == 2
