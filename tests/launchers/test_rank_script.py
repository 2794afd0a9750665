"""What a rank's task does with signals and exit codes, with a stand-in for `lens-megatron`; and the end of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launchers import script
from launchers.script import Job
from tests.launchers.jobs import job, tp_dp

LIFE = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}


@pytest.fixture
def here(tmp_path: Path) -> Job:
    (tmp_path / "run" / "launch").mkdir(parents=True)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "work dir").mkdir()
    plain = job("venv", tp_dp(4, 1), venv=str(tmp_path / "venv"))
    return replace(plain, run_dir=tmp_path / "run", work_dir=tmp_path / "work dir")


def start(job: Job, program: str, rank: int = 0, program_there: bool = True) -> subprocess.Popen[bytes]:
    """`program`: the shell of the stand-in."""
    assert job.site.venv is not None
    path = Path(job.site.venv) / "bin" / "lens-megatron"
    path.write_text(f"#!/bin/bash\n{program}\n")
    path.chmod(0o755)
    if not program_there:
        path.unlink()
    environment = {**os.environ, **LIFE, "SLURM_PROCID": str(rank)}
    return subprocess.Popen(["bash", "-c", script._rank_script(job)], env=environment, start_new_session=True)


def told(job: Job) -> str | None:
    path = job.launch / "told.7.2"
    return path.read_text().strip() if path.exists() else None


@pytest.mark.parametrize(
    ("code", "expected", "says"), [(0, 0, "0"), (1, 1, None), (2, 2, None), (85, 0, "85"), (86, 0, "86")]
)
def test_exit_codes(here: Job, code: int, expected: int, says: str | None) -> None:
    assert start(here, f'[ "$PWD" = "{here.work_dir}" ] || exit 9; exit {code}').wait(20) == expected
    assert told(here) == says


def test_other_ranks_leave_it_to_the_first(here: Job) -> None:
    assert start(here, "exit 85", rank=3).wait(20) == 0
    assert told(here) is None


def test_a_notice_is_kept_and_kills_nobody(here: Job) -> None:
    """The stand-in has no handler, as Python has none while it starts."""
    end = here.run_dir / "end"
    task = start(here, f"touch '{here.run_dir}/began'; until [ -e '{end}' ]; do sleep 0.1; done; exit 85")
    until(here.run_dir / "began")
    os.killpg(task.pid, signal.SIGUSR1)
    until(here.launch / "notice.7.2")
    time.sleep(0.1)
    os.killpg(task.pid, signal.SIGUSR1)
    end.touch()
    assert task.wait(20) == 0 and told(here) == "85"


def test_terminated_the_program_has_the_last_word(here: Job) -> None:
    task = start(here, f"trap 'sleep 0.5; exit 1' TERM; touch '{here.run_dir}/began'; while :; do sleep 0.1; done")
    until(here.run_dir / "began")
    os.killpg(task.pid, signal.SIGTERM)
    assert task.wait(20) == 1


def test_killed_program_is_a_failure(here: Job) -> None:
    assert start(here, "kill -KILL $$").wait(20) == 137


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("USR2", 140)])
def test_a_program_that_dies_of_a_signal_is_not_waited_for_again(here: Job, name: str, code: int) -> None:
    """As Python does while it starts. The shell gives 143 for a signal of its own too, and gives it at every wait."""
    task = start(here, f"kill -{name} $$; sleep 20")
    try:
        assert task.wait(10) == code
    finally:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)


def test_a_program_that_is_not_found_is_a_failure(here: Job) -> None:
    assert start(here, "exit 0", program_there=False).wait(20) == 127
    assert told(here) is None


def test_a_program_that_finds_no_other_is_a_failure(here: Job) -> None:
    assert start(here, "exit 127").wait(20) == 127


def until(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
