"""The real command trains the toy task with a real SGLang server as its engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.rollout.sglang_server import ServerProcess
from tests.loop.runs import rollouts, run_tree, train, write_task
from tests.sglang.server import cpu_config, servers

pytestmark = pytest.mark.sglang

STEPS = 2  # a run is some 20 s of imports, and a second or two a step


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def server(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = cpu_config()
    with servers(task / "model", tmp_path_factory.mktemp("logs"), config=config) as (one,):
        yield one


def tree_for(task: Path, folder: Path, server: ServerProcess, **sync: Any) -> dict[str, Any]:
    """Two tensor-parallel ranks; the server by its URL, so that all runs share it."""
    key = folder / "key"
    key.write_text(str(server.api_key))
    tree = run_tree(task, folder / "run", steps=STEPS)
    found = {"urls": [server.url], "api_key_file": str(key)}
    settings = {"fallback": "none", "bucket_mib": 0.02, "timeout_s": 60.0, **sync}
    tree["rollout"] = {**tree["rollout"], "engine": "sglang", "server": found, "sync": settings}
    return tree


@pytest.mark.parametrize("transport", ["tensor", "disk", "distributed"])
def test_trains_and_agrees(task: Path, server: ServerProcess, tmp_path: Path, transport: str) -> None:
    lines = train(tmp_path, tree_for(task, tmp_path, server, transport=transport))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["sync/probe_diff_max"] < 1e-4
        assert line["logprob_diff_max"] < 1e-4  # of every sampled token, original and purified, under its own prompt
        assert line["sync/servers"] == 1 and line["sync/fell_back"] == 0
        assert line["sync/changed_tensors"] > 0.9  # the weights did move
        assert line["staleness_max"] == 0
        assert line["grad_norm"] > 0
    assert any(line["purified_ratio"] > 0 for line in lines)
    for step in range(1, STEPS + 1):
        assert {row.weight_version for row in rollouts(tmp_path / "run", step)} == {step - 1}
    ledgers = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "sync").glob("*.json"))]
    assert [ledger["version"] for ledger in ledgers] == list(range(STEPS + 1))
    assert len({ledger["digest"] for ledger in ledgers}) == STEPS + 1
    assert all(ledger["transport"] == transport and not ledger["failed"] for ledger in ledgers)


# abort and retract, which ask nothing more of the real server than test_conformance.py does, are in tests/loop/test_servers.py
def test_one_step_of_asynchrony(task: Path, server: ServerProcess, tmp_path: Path) -> None:
    """Rollouts are made while the trainer trains; new weights wait for them."""
    lines = _train_with_rollouts_ahead(tmp_path, tree_for(task, tmp_path, server, transport="tensor"))
    assert [line["staleness"] for line in lines] == [0, 1]


def _train_with_rollouts_ahead(tmp_path: Path, tree: dict[str, Any]) -> list[dict[str, Any]]:
    tree["rollout"] |= {"staleness": 1, "max_response_tokens": 100}
    tree["algorithm"]["loss"] = {"engine_correction": {"mode": "truncate"}}
    lines = train(tmp_path, tree)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["sync/probe_diff_max"] < 1e-4 for line in lines)
    assert lines[0]["staleness_max"] == 0
    assert all(0 <= line["staleness"] <= line["staleness_max"] <= 1 for line in lines)
    for step in range(1, STEPS + 1):
        rows = rollouts(tmp_path / "run", step)
        assert len(rows) >= 16
        assert {row.weight_version for row in rows} <= {max(0, step - 2), step - 1}
    return lines


def test_engine_logprobs_stand_for_the_trainers(task: Path, server: ServerProcess, tmp_path: Path) -> None:
    """`old_logprobs: engine` from the same weights is the same update as scoring them once more."""
    tree = tree_for(task, tmp_path, server, transport="tensor")
    tree["update"] = {"old_logprobs": "engine"}
    lines = train(tmp_path, {**tree, "steps": 1})
    assert lines[0]["ratio_original"] == pytest.approx(1.0, abs=1e-4)
    assert lines[0].get("logprob_diff") is None  # compared with itself the engine always agrees


def test_the_ranks_of_a_run_start_a_server_of_their_own(task: Path, tmp_path: Path) -> None:
    """It is not drawn into the processes of the run, whose rank 0 starts it; and takes weights with rollouts under way."""
    config = cpu_config()
    tree = run_tree(task, tmp_path / "run", steps=STEPS)
    assert tree["parallel"] == {"tp": 2}
    own = {"python": config.python, "args": config.args, "env": config.env, "start_timeout_s": config.start_timeout_s}
    sync = {"fallback": "none", "in_flight": "in_place"}
    tree["rollout"] = {**tree["rollout"], "engine": "sglang", "server": own, "sync": sync}
    lines = _train_with_rollouts_ahead(tmp_path, tree)
    assert lines[0]["logprob_diff_max"] < 1e-4
    assert json.loads((tmp_path / "run" / "sync" / "version_000001.json").read_text())["transport"] == "distributed"


def test_trainer_and_server_by_turns(task: Path, server: ServerProcess, tmp_path: Path) -> None:
    """The verbs of `placement: colocated` in their order; on CPU nothing is freed at the server, and it lives on."""
    tree = {**tree_for(task, tmp_path, server, transport="auto"), "placement": "colocated", "steps": 2}
    lines = train(tmp_path, {**tree, "checkpoint": {"every": 1}})
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["logprob_diff_max"] < 1e-4 for line in lines)
    assert all(line["sync/probe_diff_max"] < 1e-4 and line["sync/residual_gib"] == 0 for line in lines)
    assert json.loads((tmp_path / "run" / "sync" / "version_000002.json").read_text())["transport"] == "tensor"
    assert not server.has_ended
