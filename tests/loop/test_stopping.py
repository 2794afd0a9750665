"""Told to end early, by signal or by file: the step is finished and saved, the exit code says who asked, nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens_megatron import checkpoints, stopping
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import STEPS, complaint, decided, finished, metrics, run_tree, started, train, write_run

pytestmark = pytest.mark.long


def test_signal_then_file_then_whole(task: Path, base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tree = run_tree(task, run_dir, steps=STEPS, checkpoint={"every": 0})
    run = str(write_run(tmp_path, tree))
    with started(tmp_path, "train", "--continue", run) as command:  # --continue starts what is not there yet
        command.until(lambda: metrics(run_dir), "a step")
        for process in command.look_around():  # as Slurm does: to every process, drivers and reward workers too
            process.send_signal(signal.SIGUSR1)
        assert command.ends() == 85, command.words()
        command.nobody_left()
    ended_after_a_whole_step(run_dir)

    with started(tmp_path, "train", "--continue", run) as command:
        before = len(metrics(run_dir))
        command.until(lambda: len(metrics(run_dir)) > before, "a step")
        stopping.ask_to_stop(run_dir)
        assert command.ends() == 86, command.words()
    ended_after_a_whole_step(run_dir)

    lines = train(tmp_path, tree, "--resume")
    assert not stopping.stop_file(run_dir).exists()
    assert [decided(line) for line in lines] == [decided(line) for line in RunFolder.open(base).read_metrics()]


def ended_after_a_whole_step(run_dir: Path) -> None:
    found = checkpoints.latest(run_dir / "checkpoints")
    assert found is not None and found.manifest.step == len(metrics(run_dir)) < STEPS


def test_a_run_in_use_is_said_to_be(task: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = str(write_run(tmp_path, run_tree(task, run_dir, steps=1000)))
    folder = RunFolder(run_dir)
    assert not folder.in_use()
    with started(tmp_path, "train", run) as command:
        command.until(lambda: metrics(run_dir), "a step")
        assert folder.in_use()
        code, words = finished(tmp_path, "train", "--resume", run)
        assert code == 2 and "in use by another running process" in complaint(words)
        command.kill_all()
    deadline = time.monotonic() + 10.0  # a killed process is a zombie a moment before its files are closed
    while folder.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_signal_is_held_for_children_too() -> None:
    """A child that knows nothing of it survives the signal; the process that holds it finds it, once."""
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path; from lens_megatron import stopping; "
        "stopping.hold_signal(); child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        "assert stopping.order(Path('.')) is None; "
        "os.kill(os.getpid(), signal.SIGUSR1); child.send_signal(signal.SIGUSR1); "
        "assert stopping.order(Path('.')) == 'make room'; "
        "child.communicate(b'\\n'); assert child.returncode == 0, child.returncode"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
