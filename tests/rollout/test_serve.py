"""`lens-megatron serve`, with a stand-in for SGLang's launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient

from .test_sglang_server import LAUNCHER


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def started(model: Path, words: Path, *more: str) -> subprocess.Popen[bytes]:
    overrides = [f"command=[{sys.executable}, {LAUNCHER}]", "env={TOKEN_SECONDS: '0.001'}", "start_timeout_s=30", *more]
    command = [sys.executable, "-m", "lens_megatron.cli", "serve", str(model), "--dir", str(model.parent / "served")]
    with words.open("wb") as file:
        return subprocess.Popen([*command, *overrides], stderr=file, start_new_session=True)


def until(process: subprocess.Popen[bytes], words: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in words.read_text():
        assert process.poll() is None and time.monotonic() < deadline, words.read_text()
        time.sleep(0.05)


def test_it_serves_and_starts_again_until_it_is_told_to_end(model: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    process = started(model, words, "--servers", "2", "restarts=1")
    try:
        until(process, words, "ready;")
        (urls,) = re.findall(r"urls=\[(\S+)\]", words.read_text())
        (key_file,) = re.findall(r"api_key_file=(\S+)", words.read_text())
        assert Path(key_file).stat().st_mode & 0o077 == 0
        loop = EventLoop()
        for url in urls.split(","):
            client = SGLangClient(url, Path(key_file).read_text().strip())
            assert len(loop.run(client.generate("a/", (5, 6), 8)).tokens) == 8
            loop.run(client.close())
        loop.close()
        servers = [p for p in psutil.Process(process.pid).children(recursive=True) if LAUNCHER in p.cmdline()[1]]
        assert len(servers) == 2
        servers[0].kill()
        until(process, words, "starting it again")
        until(process, words, f"sglang_1: {urls.split(',')[1]}")
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_server_that_may_not_start_again_ends_it_with_its_words(model: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    process = started(model, words, f"command=[{sys.executable}, {LAUNCHER}, fail]", "restarts=0")
    assert process.wait(60) == 1
    (line,) = [line for line in words.read_text().splitlines() if line.startswith("failed:")]
    assert "made-up reason" in line


@pytest.mark.parametrize(
    "words, says",
    [(["--servers", "0"], "at least 1"), (["--port", "65536"], "below 65536"), (["tpp=2"], "did you mean 'tp'"),
     (["urls=[http://a:1]"], "leave them out")],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_usage_error(
    words: list[str], says: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lens_megatron import cli

    assert cli.main(["serve", str(model), "--dir", str(model.parent / "d"), *words]) == 2
    assert says in capsys.readouterr().err
