"""What `status` says of a run that is under way: the phase of rank 0, by its flight recorder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.run_status import describe, look
from lens_megatron.recorder import Recorder
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


def test_a_run_that_has_ended_does_nothing(running: RunFolder) -> None:
    Recorder(running.logs, 0).record(0, "load the policy")
    running.append_metrics({"step": 1})
    assert look(running.path)["doing"] is not None
    running.close()
    assert look(running.path)["doing"] is None
