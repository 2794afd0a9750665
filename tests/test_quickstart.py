"""The quickstart told to end: the part that runs ends with it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil


def test_the_part_that_runs_ends_with_the_quickstart(tmp_path: Path) -> None:
    part = tmp_path / "python"  # stands in for the interpreter that the parts are started with
    part.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    part.chmod(0o755)
    (tmp_path / "run" / "toy").mkdir(parents=True)
    (tmp_path / "run" / "toy" / "test.jsonl").touch()  # the toy task is there: the first part is the base model's
    starter = f"""
        import sys
        from lens_megatron import cli, quickstart
        quickstart.sys.executable = {str(part)!r}
        sys.exit(cli.main(["quickstart", "--dir", {str(tmp_path / "run")!r}]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(starter)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        note, deadline = tmp_path / "pid", time.monotonic() + 60
        while not (note.exists() and note.read_text().strip()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        pid = int(note.read_text())
        process.terminate()
        assert process.wait(timeout=30) != 0
        assert not psutil.pid_exists(pid)
    finally:
        process.kill()
