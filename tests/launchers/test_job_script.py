"""What the batch script does before and after the trainer's step, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launchers import queue, script
from launchers.script import Job
from tests.launchers.jobs import job, tp_dp

LIFE = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}


@pytest.fixture
def here(tmp_path: Path) -> Job:
    (tmp_path / "run" / "launch").mkdir(parents=True)
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("srun", "squeue", "sleep"):
        stand_in(tmp_path, name, "exit 0")
    stand_in(tmp_path, "scontrol", "exit 0")
    return replace(job("venv", tp_dp(4, 1), setup=[]), run_dir=tmp_path / "run", work_dir=tmp_path)


def stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(job: Job, after: str = "") -> subprocess.CompletedProcess[str]:
    """`after`: what the trainer's step does."""
    path = job.work_dir / "slurm_script"
    path.write_text(script.setup_lines(job, job.launch) + after)
    environment = {**os.environ, **LIFE, "PATH": f"{job.work_dir / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, timeout=60, check=False)
    (job.run_dir / "logs" / "sbatch.out").write_text(done.stdout + done.stderr)
    return done


def outcome(job: Job) -> str:
    return (job.launch / "outcome").read_text().strip()


def with_setup(job: Job, *lines: str) -> Job:
    return replace(job, site=replace(job.site, setup=list(lines)))


@pytest.mark.parametrize(
    ("lines", "line", "code"),
    [
        (["echo before", "false", "echo after"], "false", 1),
        (["module load cuda"], "module load cuda", 127),
        (["module() { return 3; }", "module load nope"], "module load nope", 3),
        (["source no_such_file"], "source no_such_file", 1),
        (["echo 'true; (exit 4)' > last.sh", "source ./last.sh"], "source ./last.sh", 4),
        (["cd /no/such/folder; export A=b"], "cd /no/such/folder; export A=b", 1),
        (["if true; then", "  ls /no/such/folder", "fi"], "ls /no/such/folder", 2),
        (["set -E", "f() { false; }", "f"], "f", 1),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job(here: Job, lines: list[str], line: str, code: int) -> None:
    (here.launch / "outcome").write_text("unfinished 7.1\n")  # of the life before
    done = run(with_setup(here, f"cd {here.work_dir}", *lines), "echo the step\n")
    assert done.returncode == 2
    assert queue.last_error(here.run_dir) == f"error: setup: exit code {code} of: {line}"
    assert outcome(here) == "failed 2 7.2"
    assert "after" not in done.stdout and "the step" not in done.stdout


@pytest.mark.parametrize(
    "lines",
    [
        ["export A=$UNSET_VARIABLE", "[ -z $UNSET_VARIABLE ]"],
        ["[ -d /no/such/folder ] && cd /no/such/folder", "false || true", "if false; then exit 9; fi"],
        ["module() { false; true; }", "module load cuda"],
        ["printf 'false\\n[ -d /no/such/folder ] && exit 9\\nfalse\\nA=b\\n' > source.sh", "source ./source.sh"],
        ["# a comment", "export A=b \\", "  B=c"],
        ["RUN=/elsewhere LAUNCH=/elsewhere servers=17", "export life=short"],
    ],
)
def test_setup_that_does_not_fail(here: Job, lines: list[str]) -> None:
    done = run(with_setup(here, f"cd {here.work_dir}", *lines), f"false; echo the step; {DONE}")
    assert done.returncode == 0, done.stderr
    assert "the step" in done.stdout  # what comes after is not judged so
    assert outcome(here) == "done 7.2" and not (here.launch / "servers.stop").exists()


TOLD = "echo 85 > $LAUNCH/told.$life\n"
DONE = "echo 0 > $LAUNCH/told.$life\n"


def test_a_job_is_queued_again(here: Job) -> None:
    stand_in(here.work_dir, "scontrol", f'echo "$@" >> {here.work_dir}/asked')
    assert run(here, TOLD).returncode == 85
    *_, asked = (here.work_dir / "asked").read_text().splitlines()
    assert asked == "requeue 7" and outcome(here) == "unfinished 7.2"
    for other in (replace(here, links=2), replace(here, site=replace(here.site, requeue=False))):
        (here.work_dir / "asked").unlink()
        assert run(other, TOLD).returncode == 0 and outcome(here) == "unfinished 7.2"
        assert "requeue" not in (here.work_dir / "asked").read_text()


@pytest.mark.parametrize(("when", "preempted"), [("None", False), ("2026-11-30T21:27:10", True)])
def test_what_slurm_ended_for_another_job_is_no_failure(here: Job, when: str, preempted: bool) -> None:
    asked = here.work_dir / "asked"
    shown = f"JobId=7 JobState={{}} Reason=None PreemptTime={when} SuspendTime=None"
    stand_in(here.work_dir, "scontrol", f'echo "$@" >> {asked}; echo "{shown.format("RUNNING")}"')
    assert run(here, "(exit 1)\n").returncode == (85 if preempted else 1)
    assert ("requeue 7" in asked.read_text()) == preempted
    assert outcome(here) == ("unfinished 7.2" if preempted else "failed 1 7.2")
    chained = replace(here, links=2)  # the next one goes on
    asked.unlink()
    assert run(chained, "(exit 1)\n").returncode == 1 and "requeue" not in asked.read_text()
    assert outcome(here) == ("unfinished 7.2" if preempted else "failed 1 7.2")
    asked.unlink(missing_ok=True)  # what is wrong with RUN.yaml is wrong with the next life too
    assert run(here, "(exit 2)\n").returncode == 2 and "requeue" not in asked.read_text()
    assert outcome(here) == "failed 2 7.2"


@pytest.mark.parametrize("after", ["sleep_really 0.5; true\n", "sleep_really 0.5; (exit 1)\n"])
def test_a_job_that_slurm_ends_is_neither_done_nor_failed(here: Job, after: str) -> None:
    """SIGTERM to the shell too: by scancel, and by a preemption without a grace time. Slurm says whether it comes again."""
    stand_in(here.work_dir, "sleep_really", "touch $LAUNCH/began; exec /bin/sleep $1")
    asked = here.work_dir / "asked"
    stand_in(here.work_dir, "scontrol", f'echo "$@" >> {asked}')
    path = here.work_dir / "slurm_script"
    path.write_text(f"{script.setup_lines(here, here.launch)}export LAUNCH\n{after}")
    environment = {**os.environ, **LIFE, "PATH": f"{here.work_dir / 'bin'}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(path)], env=environment)
    deadline = time.monotonic() + 20
    while not (here.launch / "began").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)
    job.terminate()
    assert job.wait(20) == 143
    assert outcome(here) == "unfinished 7.2"
    assert not asked.exists() or "requeue" not in asked.read_text()


def test_an_end_without_a_word_of_rank_0_is_not_done(here: Job) -> None:
    assert run(here, "true\n").returncode == 0 and outcome(here) == "unfinished 7.2"
    assert run(here, DONE).returncode == 0 and outcome(here) == "done 7.2"


def test_a_controller_that_is_away_for_a_while(here: Job) -> None:
    """The third time it answers; until then the outcome says what would be if the time limit came now."""
    stand_in(
        here.work_dir,
        "scontrol",
        f"""[ "$1" = requeue ] || exit 0
cat {here.launch}/outcome >> {here.work_dir}/asked
[ $(wc -l < {here.work_dir}/asked) = 3 ]""",
    )
    stand_in(here.work_dir, "sleep", f'echo "$1" $(cat {here.launch}/outcome) >> {here.work_dir}/slept')
    assert run(here, TOLD).returncode == 85
    assert outcome(here) == "unfinished 7.2"
    assert (here.work_dir / "slept").read_text().splitlines() == [
        *["10 unfinished unqueued 7.2"] * 2,
        "60 unfinished 7.2",
    ]


def test_a_controller_that_stays_away(here: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_REQUEUE_S", 1)
    stand_in(here.work_dir, "scontrol", "exit 1")
    assert run(here, TOLD).returncode == 85
    assert outcome(here) == "unfinished unqueued 7.2"
    monkeypatch.setattr(queue, "run_command", lambda command: None)  # nobody remembers it
    status = queue.status(here.run_dir, ["7"])
    assert (status.state, status.job) == ("unfinished", "7")
    assert status.reason == "Slurm did not answer when the job was to be queued again: launch it with --resume"
    assert queue.last_error(here.run_dir) == "error: Slurm did not queue the job again for 1 s"
