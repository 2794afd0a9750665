"""Held-out problems during training: the same answers as `eval` gives of the saved steps, and training as without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.data import toy
from lens_megatron.evaluation.config import EvalConfig
from lens_megatron.evaluation.evaluate import evaluate
from lens_megatron.evaluation.models import find_models
from lens_megatron.reporting import figures
from lens_megatron.reporting.runs import load_runs
from lens_megatron.rewards.config import RewardConfig, RewardRule
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import as_of, complaint, decided, finished, run_tree, train, write_run

HELD_OUT = 12


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    toy.write_jsonl(path, toy.prompt_rows(HELD_OUT, seed=7, split="test"))
    return path


@pytest.fixture(scope="module")
def evaluated(task: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three steps with a checkpoint of each, evaluated every two; greedy, so that only the weights decide."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluation = {"every": 2, "benchmarks": [str(held_out)], "temperature": 0.0, "max_response_tokens": 10}
    every = {"every": 1, "keep": 3}
    tree = run_tree(task, folder / "run", steps=3, evaluation=evaluation, checkpoint=every)
    train(folder, tree)
    return folder / "run", tree


def of_training(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in decided(line).items() if not name.startswith("eval/")}


def test_evaluated_before_the_first_step_when_due_and_after_the_last(evaluated: Any) -> None:
    lines = RunFolder.open(evaluated[0]).read_metrics()
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "eval/held" in line] == [0, 2, 3]
    for line in lines:
        if "eval/held" in line:
            assert line["time/eval"] > 0
            kept = (evaluated[0] / "evaluations" / f"step_{line['step']:06d}.jsonl").read_text().splitlines()
            rewards = [json.loads(answer)["reward"] for answer in kept]
            assert len(rewards) == HELD_OUT and sum(rewards) / HELD_OUT == pytest.approx(line["eval/held"])
    assert lines[0]["loss"] is None and lines[0]["tokens"] is None


def test_training_is_what_it_is_without(evaluated: Any, base: Path) -> None:
    lines = RunFolder.open(evaluated[0]).read_metrics()[1:]
    expected = RunFolder.open(base).read_metrics()[:3]
    assert [of_training(line) for line in lines] == [of_training(line) for line in expected]


def test_a_resumed_run_comes_to_the_same(evaluated: Any, tmp_path: Path) -> None:
    run, tree = evaluated
    again = as_of(run, 1, tmp_path / "run")
    (again / "evaluations" / "step_000003.jsonl").write_text("stale")
    lines = train(tmp_path, {**tree, "run_dir": str(again)}, "--resume")
    assert [decided(line) for line in lines] == [decided(line) for line in RunFolder.open(run).read_metrics()]
    for step in (0, 2, 3):
        name = f"evaluations/step_{step:06d}.jsonl"
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_eval_of_the_run_answers_as_the_run_did(evaluated: Any, held_out: Path, tmp_path: Path) -> None:
    """Every saved step converted, loaded and asked: the same words, so the same weights and the same template."""
    run, _ = evaluated
    rule = RewardRule(kind="function", function="tests.loop.loop_rewards:by_hash")
    config = EvalConfig(
        benchmarks=[str(held_out)],
        temperature=0.0,
        max_response_tokens=10,
        slots=5,
        rewards=RewardConfig(workers=1, default=rule),
    )
    models = find_models(str(run))
    assert [(model.step, model.megatron) for model in models] == [(0, False), (1, True), (2, True), (3, True)]
    results = evaluate(models, config, tmp_path)
    metrics = {line["step"]: line for line in RunFolder.open(run).read_metrics()}
    for result, model in zip(results, models, strict=True):
        if model.step == 1:
            continue
        kept = (run / "evaluations" / f"step_{model.step:06d}.jsonl").read_text().splitlines()
        ours = (tmp_path / "answers" / f"{model.name}.jsonl").read_text().splitlines()[1:]
        assert sorted(map(as_said, kept)) == sorted(map(as_said, ours))
        assert result.average == pytest.approx(metrics[model.step]["eval/held"])
    assert not list(tmp_path.rglob("*.safetensors"))  # conversions are removed
    said = [(tmp_path / "answers" / f"step_{step:06d}.jsonl").read_text() for step in (0, 3)]
    assert said[0] != said[1]  # or nothing was shown: training must have changed what is said
    page = (tmp_path / "step_000003.html").read_text()
    assert (
        "Figure 4: learning curves" in page and len(json.loads((tmp_path / "results.json").read_text())["models"]) == 4
    )


def as_said(line: str) -> str:
    answer = json.loads(line)
    return json.dumps([answer[name] for name in ("id", "response", "tokens", "finish", "reward")])


def test_the_report_counts_steps_that_trained(evaluated: Any) -> None:
    (run,) = load_runs([evaluated[0]])
    lines = RunFolder.open(evaluated[0]).read_metrics()
    trained = sum(line["time/step"] - line.get("time/eval", 0.0) for line in lines if line["step"] > 0)
    assert figures.seconds_until(run, 3) == pytest.approx(trained)
    time = figures.step_time(run)
    assert time is not None and "eval" not in time.phases
    assert [step for step, _ in run.points("eval/held")] == [0, 2, 3]


def test_bad_held_out_data_ends_a_run_before_it_begins(task: Path, tmp_path: Path) -> None:
    tree = run_tree(task, tmp_path / "run", evaluation={"benchmarks": ["math500"], "data": str(tmp_path)})
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, {**tree, "parallel": {"tp": 1}})))
    assert code == 2 and "math500.jsonl: No such file" in complaint(words)
    assert not (tmp_path / "run" / "config.yaml").exists()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
