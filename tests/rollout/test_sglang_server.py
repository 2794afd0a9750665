"""Servers as processes: started with their own settings, started again, and gone when their run is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lens_megatron import strict
from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_seat import seats
from lens_megatron.rollout.sglang_server import ServerAddress, ServerProcess, server_processes

from .test_sglang_engine import FAST, check, drain, name_weights, requests, sync

LAUNCHER = str(Path(__file__).parent / "stub_launcher.py")


def launched(**changes: Any) -> ServerConfig:
    command = (sys.executable, LAUNCHER, *changes.pop("words", ()))
    values = {**FAST, "start_timeout_s": 30.0, "command": command, "env": {"TOKEN_SECONDS": "0.01"}, **changes}
    return ServerConfig(**values)


def running_environment(process: psutil.Process) -> dict[str, str]:
    """Its own: between fork and exec a process still has its parent's."""
    deadline = time.monotonic() + 20
    while "OWN" not in (environment := process.environ()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return environment


def settings(process: ServerProcess) -> dict[str, Any]:
    return yaml.safe_load(process.log.with_suffix(".yaml").read_text())


def test_each_server_has_its_own_settings_in_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("RANK", "0")
    args = {"mem-fraction-static": 0.7, "dtype": "bfloat16"}
    config = launched(tp=4, args=args, env={"TOKEN_SECONDS": "0", "OWN": "1"})
    two = server_processes(
        config, 2, "/models/m", tmp_path, 8, {"dtype": "float32", "skip_tokenizer_init": True}, seed=3
    )
    try:
        seeds = set()
        for number, process in enumerate(two):
            process.start()
            given = settings(process)
            assert given["base-gpu-id"] == 8 + 4 * number and given["tp-size"] == 4
            assert (given["mem-fraction-static"], given["dtype"]) == (
                0.7,
                "bfloat16",
            )  # the user's stand above the run's
            assert given["skip-tokenizer-init"] is True and given["model-path"] == "/models/m"
            seeds.add(given["random-seed"])
            family = psutil.Process(process._process.pid)  # type: ignore[union-attr]
            assert process.api_key not in " ".join(family.cmdline())
            assert process.log.stat().st_mode & 0o077 == process.log.with_suffix(".yaml").stat().st_mode & 0o077 == 0
            environment = running_environment(family)
            assert environment["OWN"] == "1" and not {"RANK", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys()
        first = two[0].url
        two[0].start()
        seeds.add(settings(two[0])["random-seed"])
        assert len(seeds) == 3, "servers, or starts, would sample alike"
        assert two[0].api_key == two[1].api_key and two[0].url != first
    finally:
        for process in two:
            process.stop()


def test_a_server_that_dies_is_started_again_and_brought_back(tmp_path: Path) -> None:
    restored: list[ServerAddress] = []

    def resync(address: ServerAddress, version: int, label: str) -> None:
        restored.append(address)
        name_weights(address, label)

    config = launched(restarts=1, env={"TOKEN_SECONDS": "0.02"})
    engine = SGLangEngine(seats(config, 1, "m", tmp_path, 0, {}, 0), config, resync)
    try:
        sync(engine, 3)
        (before,) = engine.servers()
        wanted = requests(12, 100)
        engine.submit(wanted)
        time.sleep(0.5)
        server_of(engine).kill()
        check(drain(engine, 12, 40.0), wanted)
        (after,) = engine.servers()
        assert [address.start for address in (before, after)] == [1, 2] and restored == [after]
        engine.begin_update(4)  # a sync that began with the server of before does not count
        with pytest.raises(RunError, match="reached no SGLang server"):
            engine.end_update([before])
    finally:
        engine.close()


def server_of(engine: SGLangEngine, number: int = 0) -> psutil.Process:
    guard = engine._pool.seats[number].process._process  # type: ignore[union-attr]
    (server,) = psutil.Process(guard.pid).children()  # type: ignore[union-attr]
    return server


def test_after_its_restarts_the_run_ends_with_the_servers_last_words(tmp_path: Path) -> None:
    config = launched(restarts=0)
    engine = SGLangEngine(seats(config, 1, "m", tmp_path, 0, {}, 0), config)
    try:
        sync(engine, 3)
        engine.submit(requests(3, 2000))
        time.sleep(0.3)
        server_of(engine).send_signal(signal.SIGKILL)
        with pytest.raises(RunError, match=r"sglang_0 is gone: .*137"):
            drain(engine, 3)
    finally:
        engine.close()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    config = launched(words=("fail",))
    with pytest.raises(
        RunError, match=r"sglang_0 ended while starting \(exit code 3\): ValueError: made-up reason; .*log"
    ):
        SGLangEngine(seats(config, 1, "m", tmp_path, 0, {}, 0), config)
    # as the trainer's own python does: it has no SGLang
    config = launched(command=(sys.executable, "-S", "-m", "sglang.launch_server"))
    advice = r"sglang_0 ended while starting .*No module named 'sglang'.*: set rollout.server.python to .*; .*log"
    with pytest.raises(RunError, match=advice):
        SGLangEngine(seats(config, 1, "m", tmp_path, 0, {}, 0), config)
    config = launched(command=("/nonexistent/python",))
    with pytest.raises(RunError, match=r"ended while starting .*No such file"):
        SGLangEngine(seats(config, 1, "m", tmp_path, 0, {}, 0), config)


def test_a_server_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_server import server_processes
config = ServerConfig(command=({sys.executable!r}, {LAUNCHER!r}), env={{"TOKEN_SECONDS": "0"}})
server = server_processes(config, 1, "m", Path({str(tmp_path)!r}), 0, {{}})[0]
server.start()
print(server._process.pid, flush=True)
time.sleep(100)
"""
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    guard = psutil.Process(int(run.stdout.readline()))
    deadline = time.monotonic() + 20
    while not guard.children():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = [guard, *guard.children(recursive=True)]
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not psutil.wait_procs(family, timeout=15)[1]


@pytest.mark.parametrize(
    "tree, says",
    [
        ({"dp": 2}, "enable_dp_attention"),
        ({"tp": 0}, "at least 1"),
        ({"args": {"model-path": "x"}}, "args.model-path"),
        ({"args": {"api_key": "x"}}, "args.api_key"),
        ({"urls": ["10.0.0.7:30000"]}, "write it as http://HOST:PORT"),
        ({"urls": ["http://a:1", "http://a:1"]}, "the same server twice"),
        ({"urls": ["http://a:1"], "python": "python3"}, "run already"),
        ({"router": "http://a:1"}, "belong to servers given by urls"),
        ({"urls": ["http://a:1"], "api_key_file": "/nonexistent"}, "there is no file"),
        ({"silence_s": 0}, "silence_s is above 0"),
        ({"arg": {}}, "did you mean 'args'"),
        ({"args": {"x": {"y": 1}}}, "args.x"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        strict.build(ServerConfig, tree, "run.yaml")


def test_an_address_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"203\.0\.113\.1 is no address of this machine"):
        server_processes(launched(host="203.0.113.1"), 1, "m", tmp_path, 0, {})[0].start()
