"""`lens-megatron serve`: servers that somebody else's run takes by URL."""

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

from .server import CPU_ARGS, CPU_ENV, START_SECONDS
from .venv import build

pytestmark = pytest.mark.sglang


def test_it_serves_until_it_is_told_to_end(tiny_folder: Path, tmp_path: Path) -> None:
    values = {"python": build(), "start_timeout_s": START_SECONDS, "restarts": 0}
    values |= {f"args.{name}": str(value).lower() for name, value in {**CPU_ARGS, "skip_tokenizer_init": True}.items()}
    environment = "{" + ", ".join(f"{name}: '{value}'" for name, value in CPU_ENV.items()) + "}"
    overrides = [f"{name}={value}" for name, value in values.items()] + [f"env={environment}"]
    words = tmp_path / "words.txt"
    with words.open("wb") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lens_megatron.cli",
                "serve",
                str(tiny_folder),
                "--dir",
                str(tmp_path / "d"),
                *overrides,
            ],
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "ready;" not in words.read_text():
            assert process.poll() is None and time.monotonic() < deadline, words.read_text()
            time.sleep(0.2)
        (url,) = re.findall(r"urls=\[(\S+)\]", words.read_text())
        (key_file,) = re.findall(r"api_key_file=(\S+)", words.read_text())
        loop = EventLoop()
        client = SGLangClient(url, Path(key_file).read_text().strip())
        assert len(loop.run(client.generate("a/", (5, 6), 8)).tokens) == 8
        loop.run(client.close())
        loop.close()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
