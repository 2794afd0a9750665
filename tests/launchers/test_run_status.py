"""What `status` says of a run that is under way: the phase of rank 0, by its flight recorder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import run_status
from launchers.queue import JobStatus
from launchers.run_status import describe, look
from lens_megatron.recorder import Recorder, path_of
from lens_megatron.run_folder import RunFolder


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    folder = RunFolder.create(tmp_path / "run")
    # a process's own lock does not keep itself out
    monkeypatch.setattr(RunFolder, "in_use", lambda self: folder._lock is not None)
    taken = time.time() - 100
    os.utime(folder.path / "run.lock", (taken, taken))
    yield folder
    folder.close()


def doing(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, seconds_later: float) -> str | None:
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + seconds_later)
        return dict(describe(look(folder.path))).get("doing")


def test_the_phase_and_for_how_long(running: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doing(running, monkeypatch, 0) is None
    recorder = Recorder(running.logs, 0)
    recorder.record(0, "load the policy")
    assert doing(running, monkeypatch, 72) == "load the policy, for 1 m 12 s"
    recorder.record(0, "load the policy", 72.0)
    recorder.record(13, "generate")
    assert doing(running, monkeypatch, 5) == "generate (step 13), for 5 s"
    recorder.record(13, "generate", 5.0)
    assert doing(running, monkeypatch, 0) == "after generate (step 13), for 0 s"


def test_not_what_an_earlier_life_did(running: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(running.logs, 0).record(13, "generate")
    later = time.time() + 100
    os.utime(running.path / "run.lock", (later, later))
    assert doing(running, monkeypatch, 200) is None


@pytest.mark.parametrize(
    ("used", "shown"), [("00:00:20", False), ("00:00:59", True), ("1-00:00:01", True), ("INVALID", False)]
)
def test_a_job_that_was_queued_again_has_not_begun_with_what_the_life_before_ended(
    running: RunFolder, monkeypatch: pytest.MonkeyPatch, used: str, shown: bool
) -> None:
    """It runs, and its processes have not taken the folder yet."""
    Recorder(running.logs, 0).record(13, "generate")
    handle = SimpleNamespace(status=lambda: JobStatus("running", "7", used=used, limit="04:00:00", restarts=1))
    monkeypatch.setattr(run_status.Handle, "of", lambda run_dir: handle)
    assert (doing(running, monkeypatch, 50) is not None) == shown


def test_who_is_refused_the_folder_does_not_count_as_its_life(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    before = folder.taken_at()
    assert abs(before - time.time()) < 5
    other = f"from lens_megatron.run_folder import RunFolder; RunFolder.create({str(folder.path)!r})"
    refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert "in use by another running process" in refused.stderr
    assert folder.taken_at() == before
    folder.close()


def test_a_recorder_that_cannot_be_read_is_passed_over(running: RunFolder) -> None:
    path_of(running.logs, 0).mkdir(parents=True)
    assert look(running.path)["doing"] is None


def test_a_run_that_has_ended_does_nothing(running: RunFolder) -> None:
    Recorder(running.logs, 0).record(0, "load the policy")
    running.append_metrics({"step": 1})
    assert look(running.path)["doing"] is not None
    running.close()
    assert look(running.path)["doing"] is None


def test_a_folder_of_another_user_is_taken_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    RunFolder.create(tmp_path / "run").close()
