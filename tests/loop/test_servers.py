"""The whole command with servers for an engine: how trainer, weight sync and engine are joined. The server is a STUB that takes
any weights and makes up tokens and log-probs; tests/sglang/test_training.py does the same with the real one."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.loop.runs import Command, complaint, finished, metrics, rollouts, run_tree, started, train, write_run
from tests.rollout.test_sglang_client import stub_server
from tests.rollout.test_sglang_server import LAUNCHER

pytestmark = pytest.mark.long


def tree_for(task: Path, folder: Path, url: str, **sync: Any) -> dict[str, Any]:
    tree = run_tree(task, folder / "run", parallel={"tp": 1})
    settings = {"fallback": "none", "bucket_mib": 0.02, "timeout_s": 20.0, "probe_tolerance": 1e9, **sync}
    tree["rollout"] = {**tree["rollout"], "engine": "sglang", "server": {"urls": [url]}, "sync": settings}
    tree["guards"] = {"on_logprob_diff": "report"}  # it makes up its log-probs
    return tree


CASES: dict[str, dict[str, Any]] = {
    "disk": {"sync": {"transport": "disk"}},
    "colocated": {"sync": {}, "placement": "colocated"},
    "abort": {"sync": {"transport": "tensor", "in_flight": "abort"}, "staleness": 1},
    "retract": {"sync": {"transport": "tensor", "in_flight": "retract"}, "staleness": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_train_with_servers(task: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    stale = bool(case.get("staleness"))
    # slow enough that new weights meet rollouts under way
    with stub_server("--vocab", "97", "--token-seconds", "0.2" if stale else "0.001") as url:
        tree = tree_for(task, tmp_path, url, **case["sync"])
        tree["rollout"]["staleness"] = case.get("staleness", 0)
        tree["placement"] = case.get("placement", "disaggregated")
        tree["checkpoint"] = {"every": 1}
        if stale:
            tree["algorithm"]["loss"] = {"engine_correction": {"mode": "truncate"}}
        lines = train(tmp_path, tree)
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["sync/version"] for line in lines] == [1, 2]
    assert all(line["sync/servers"] == 1 and line["sync/bytes"] > 0 for line in lines)
    assert lines[0]["staleness_max"] == 0
    assert lines[1]["staleness_max"] <= int(stale)
    assert ("sync/residual_gib" in lines[0]) == (name == "colocated")
    ledgers = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "sync").glob("*.json"))]
    assert [ledger["version"] for ledger in ledgers] == [0, 1, 2]
    transport = {"disk": "disk"}.get(name, "tensor")
    assert all(ledger["transport"] == transport and not ledger["failed"] for ledger in ledgers)
    assert len(rollouts(tmp_path / "run", 2)) >= 16
    kept = sorted(path.name for path in (tmp_path / "run").glob("weights/version_*"))
    assert kept == (["version_000001", "version_000002"] if name == "disk" else [])


def test_a_probe_that_differs_ends_the_run(task: Path, tmp_path: Path) -> None:
    with stub_server("--vocab", "97") as url:
        tree = tree_for(task, tmp_path, url, transport="tensor", probe_tolerance=None)
        code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 1
    assert "version 0 reached no rollout server whole" in complaint(words)
    assert "log-probs of the probe differ from the trainer's by up to" in complaint(words)


def test_in_place_is_refused_of_servers_that_would_keep_the_cache_of_old_weights(task: Path, tmp_path: Path) -> None:
    with stub_server("--vocab", "97") as url:
        tree = tree_for(task, tmp_path, url, in_flight="in_place")
        code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 2
    assert f"rollout.sync.in_flight: in_place: sglang_0 ({url}) was started without disable_radix_cache" in complaint(
        words
    )


def _server(command: Command, settings: Path) -> psutil.Process:
    """Not its guard, which has the same words behind its own."""
    found = []
    for process in command.look_around():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == [LAUNCHER, "--config", str(settings)]:
                found.append(process)
    (server,) = found
    return server


def test_servers_that_the_run_starts_end_with_it_and_one_that_dies_is_replaced(task: Path, tmp_path: Path) -> None:
    environment = {"TOKEN_SECONDS": "0.1", "VOCAB": "97"}
    server = {"command": [sys.executable, LAUNCHER], "env": environment, "restarts": 1, "start_timeout_s": 60.0}
    tree = run_tree(task, tmp_path / "run", parallel={"tp": 1})
    sync = {"transport": "disk", "fallback": "none", "timeout_s": 20.0, "probe_tolerance": 1e9, "in_flight": "in_place"}
    tree["rollout"] = {**tree["rollout"], "engine": "sglang", "servers": 2, "server": server, "sync": sync}
    tree["guards"] = {"on_logprob_diff": "report"}
    with started(tmp_path, "train", str(write_run(tmp_path, tree))) as command:
        log = tmp_path / "run" / "logs" / "sglang_1.log"
        ledger = tmp_path / "run" / "sync" / "version_000000.json"
        command.until(ledger.exists, "the first weights at the servers")
        _server(command, log.with_suffix(".yaml")).kill()
        assert command.ends() == 0, command.words()
        command.nobody_left()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert log.read_text().count("--- start") == 2
    arguments = yaml.safe_load(log.with_suffix(".yaml").read_text())
    assert (
        arguments["disable-radix-cache"] is arguments["disable-overlap-schedule"] is True
    )  # it takes weights in place
    assert "SGLang is ready after" in command.words()
