"""What is said of a job that failed, from its logs and from Slurm's words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launchers import queue
from launchers.nemo import submission_error
from lens_megatron.errors import RunError, UsageError
from lens_megatron.machine import Output


def write_logs(folder: Path, *texts: str) -> Path:
    (folder / "logs").mkdir(parents=True)
    for age, text in enumerate(reversed(texts)):  # the last is the newest
        path = folder / "logs" / f"log-{age}.out"
        path.write_text(text)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return folder


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["step 1/3\nstep 2/3\n"], ""),
        (
            ["step 1/3\nfailed: the disk is full\nsrun: error: node1: task 0: Exited with exit code 1\n"],
            "failed: the disk is full",
        ),
        (["error: old\n", "step 1\nfailed: new\n"], "failed: new"),
        (["failed: why\n", "srun: error: node2: task 1: Killed\n"], "failed: why"),
        (["Traceback (most recent call last):\n  File\nValueError: bad\n"], "ValueError: bad"),
        (
            ["/x/slurm_script: line 3: lens-megatron: command not found\n"],
            "/x/slurm_script: line 3: lens-megatron: command not found",
        ),
        (["no error: here is none\n"], ""),
        (["error: why\nfailed: rank 1: another process of the run went away (gloo)\n"], "error: why"),
        (
            ["failed: rank 1: another process of the run went away (x)\n"],
            "failed: rank 1: another process of the run went away (x)",
        ),
    ],
)
def test_last_error(texts: list[str], expected: str, tmp_path: Path) -> None:
    assert queue.last_error(write_logs(tmp_path, *texts)) == expected


def test_what_nobody_remembers_is_read_from_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "run_command", lambda command: None)  # no Slurm here any more
    write_logs(tmp_path, "failed: the reason\n")
    assert queue.status(tmp_path, ["7"]).state == "unknown"
    (tmp_path / "launch").mkdir()
    for text, state, reason in (
        ("done 7.0\n", "done", ""),
        ("stopped 7.1\n", "stopped", ""),
        ("unfinished 7.0\n", "unfinished", ""),
        ("failed 1 7.2\n", "failed", "failed: the reason"),
    ):
        (tmp_path / "launch" / "outcome").write_text(text)
        found = queue.status(tmp_path, ["7"])
        assert (found.state, found.reason, found.active) == (state, reason, False)


def test_a_controller_that_does_not_answer_ends_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        [
            Output(False, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
            Output(False, "Slurm accounting storage is disabled"),
            Output(True, "JobId=7 JobState=RUNNING NodeList=node1"),
            Output(True, "JobId=7 JobState=COMPLETED NodeList=node1"),
        ]
    )
    monkeypatch.setattr(queue, "run_command", lambda command: next(answers))
    handle = queue.Handle(tmp_path, ("7",))
    silent = handle.status()
    assert (silent.state, silent.over) == ("unknown", False)
    assert silent.reason.startswith("Slurm does not answer: slurm_load_jobs error: Unable to contact")
    assert handle.wait(poll_s=0.0).state == "done"


def test_waiting_tells_every_reason_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = "JobId=7 JobState=PENDING Reason={}"
    answers = [
        *[Output(True, pending.format(reason)) for reason in ("None", "Priority", "Resources", "Priority")],
        *[Output(True, pending.format("PartitionNodeLimit"))] * 2,
        Output(True, "JobId=7 JobState=RUNNING Reason=None"),
        Output(True, "JobId=7 JobState=COMPLETED"),
    ]
    left = iter(answers)
    monkeypatch.setattr(queue, "run_command", lambda command: next(left))
    told: list[str] = []
    assert queue.Handle(tmp_path, ("7",)).wait(poll_s=0.0, tell=told.append).state == "done"
    assert told == [
        "job 7 pending: Slurm says Priority",
        "job 7 pending: Slurm says Resources",
        "job 7 pending: Slurm says PartitionNodeLimit: it asks for more nodes, or more time, than the partition allows",
    ]


@pytest.mark.parametrize(
    ("word", "reason", "never"),
    [
        ("PENDING", "PartitionNodeLimit", True),
        ("PENDING", "ReqNodeNotAvail", False),  # a node comes back
        ("PENDING", "JobHeldUser", False),
        ("PENDING", "Priority", False),
        ("CANCELLED", "PartitionNodeLimit", False),
    ],
)
def test_a_job_that_can_never_start(
    word: str, reason: str, never: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Output(True, f"JobId=7 JobState={word} Reason={reason}")
    monkeypatch.setattr(queue, "run_command", lambda command: shown)
    assert queue.status(tmp_path, ["7"]).never == never


def test_a_job_that_slurm_has_forgotten_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = Output(False, "slurm_load_jobs error: Invalid job id specified")
    monkeypatch.setattr(queue, "run_command", lambda command: forgotten)
    status = queue.status(tmp_path, ["7"])
    assert (status.state, status.over) == ("unknown", True)


def test_sbatchs_words() -> None:
    said = (
        "x\nsbatch: error: invalid partition specified: q\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    refused = submission_error(said)
    assert isinstance(refused, UsageError)
    assert str(refused) == "Slurm refused the job: invalid partition specified: q; Invalid partition name specified"
    assert isinstance(submission_error("something else\n"), RunError)
