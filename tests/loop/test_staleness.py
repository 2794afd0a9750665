"""One step of asynchrony: the next batch is generated, with older weights, while this one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_megatron.config import load_run
from lens_megatron.errors import UsageError
from tests.loop.runs import as_of, decided, metrics, rollouts, run_tree, train

pytestmark = pytest.mark.long

STEPS = 4


def stale_tree(task: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    tree = run_tree(task, run_dir, steps=STEPS, parallel={"tp": 1}, checkpoint={"every": 1, "keep": STEPS})
    tree["rollout"] = {**tree["rollout"], "staleness": 1}
    correction = {"engine_correction": {"mode": "truncate"}}
    tree["algorithm"] = {**tree["algorithm"], "loss": correction}
    return {**tree, **changes}


@pytest.fixture(scope="module")
def stale(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stale")
    train(folder, stale_tree(task, folder / "run"))
    return folder / "run"


def test_all_but_the_first_batch_are_one_version_old(stale: Path) -> None:
    lines = metrics(stale)
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    assert [line["staleness_max"] for line in lines] == [0, 1, 1, 1]
    for step in range(1, STEPS + 1):
        assert {row.weight_version for row in rollouts(stale, step)} == {max(0, step - 2)}
        assert {row.step for row in rollouts(stale, step)} == {step}  # as the line of metrics.jsonl is numbered
    # what the trainer says of them differs from what the engine said, by one update; the correction sees it
    assert lines[0]["logprob_diff"] < 1e-5
    assert all(line["logprob_diff"] > 1e-4 for line in lines[1:])
    assert all(line["purified_ratio"] > 0 for line in lines)


def test_the_batch_in_flight_is_part_of_the_checkpoint(task: Path, stale: Path, tmp_path: Path) -> None:
    run_dir = as_of(stale, 2, tmp_path / "run")
    again = train(tmp_path, stale_tree(task, run_dir), "--resume")
    expected = metrics(stale)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    assert [decided(line) for line in again] == [decided(line) for line in expected]
    for step in (3, 4):
        assert rollouts(stale, step) == rollouts(run_dir, step)


def test_without_staleness_the_batch_in_flight_is_made_again(task: Path, stale: Path, tmp_path: Path) -> None:
    run_dir = as_of(stale, 2, tmp_path / "run")
    tree = stale_tree(task, run_dir, steps=3)
    tree["rollout"]["staleness"] = 0
    lines = train(tmp_path, tree, "--resume")
    assert [line["staleness_max"] for line in lines] == [0, 1, 0]
    before, after = (rollouts(folder, 3) for folder in (stale, run_dir))
    assert {row.weight_version for row in before} == {1} and {row.weight_version for row in after} == {2}
    assert {row.prompt_id for row in before} == {row.prompt_id for row in after}


def test_a_filter_may_ask_for_more_than_was_made_ahead(task: Path, tmp_path: Path) -> None:
    """Its further batches are made when they are asked for, with weights of the day."""
    tree = stale_tree(task, tmp_path / "run", steps=3, checkpoint={"every": 0})
    correction = {"engine_correction": {"mode": "truncate"}}
    tree["algorithm"] = {"preset": "grpo", "filter": {"mode": "dynamic", "size_factor": 1.0}, "loss": correction}
    tree["rollout"]["n"] = 2  # two equal rewards are no signal
    lines = train(tmp_path, tree)
    assert [line["staleness_max"] for line in lines] == [0, 1, 1]
    again = [line for line in lines[1:] if line["filter/batches"] > 1]
    assert again
    assert all(0 < line["staleness"] < 1 for line in again)


def test_it_must_be_corrected_for(task: Path, tmp_path: Path) -> None:
    tree = stale_tree(task, tmp_path / "run")
    tree["algorithm"].pop("loss")
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError, match=r"rollout\.staleness 1 trains on rollouts of older weights"):
        load_run(path, [])
    assert load_run(path, ["update.old_logprobs=engine"]).rollout.staleness == 1
    assert load_run(path, ["update.old_logprobs=engine", "algorithm=lens_resample"]).rollout.staleness == 1
    # the engine never saw a purified rollout's original prompt: these would train uncorrected
    mixture = "algorithm={preset: lens, rescue: {replacement: union}, loss: {purified_ratio: mixture(token)}}"
    for algorithm in ("algorithm=lens_no_importance", mixture):
        with pytest.raises(UsageError, match=r"update\.old_logprobs: engine is of the prompt that was rolled out"):
            load_run(path, ["update.old_logprobs=engine", algorithm])


def test_a_length_penalty_leaves_some_lengths_alone(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(run_tree(task, tmp_path / "run", algorithm="dapo")))  # 12 tokens at most
    with pytest.raises(
        UsageError, match=r"buffer_tokens 4096 punishes every length: rollout.max_response_tokens is 12"
    ):
        load_run(path, [])
    with pytest.raises(UsageError, match="buffer_tokens 12 punishes every length"):
        load_run(path, ["algorithm.advantage.overlong.buffer_tokens=12"])
    assert load_run(path, ["algorithm.advantage.overlong.buffer_tokens=11"]).algorithm.advantage.overlong is not None


def test_weights_during_generation_are_for_servers_only(task: Path, tmp_path: Path) -> None:
    tree = stale_tree(task, tmp_path / "run")
    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump(tree))
    for mode in ("abort", "retract", "in_place"):
        with pytest.raises(UsageError, match=rf"rollout\.sync\.in_flight {mode} needs rollout\.engine sglang"):
            load_run(path, [f"rollout.sync.in_flight={mode}"])
    assert load_run(path, ["rollout.sync.in_flight=abort", "rollout.engine=sglang"]).rollout.staleness == 1
