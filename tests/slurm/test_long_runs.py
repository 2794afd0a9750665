"""Runs that outlive their jobs: every ending is gone on from, and the metrics are those of one uninterrupted run."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.queue import Handle
from lens_megatron import checkpoints, cli
from tests.loop.runs import complaint, decided, metrics
from tests.slurm.conftest import STEPS, Launcher

pytestmark = pytest.mark.slurm
SLOWLY = "rewards.default.function=loop_rewards:slowly"  # about a second a step: something can happen in the middle


def same_as(base: list[dict[str, Any]], launcher: Launcher) -> None:
    lines = metrics(launcher.run_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in base]
    assert not any(line.get("rewards/failed") for line in lines + base), "a judgement failed: the machine, not the run"
    for line, expected in zip(map(decided, lines), map(decided, base), strict=True):
        different = {name for name in line.keys() | expected.keys() if line.get(name) != expected.get(name)}
        assert not different, {name: (line.get(name), expected.get(name)) for name in different}


def newest_checkpoint(launcher: Launcher) -> int:
    found = checkpoints.latest(launcher.run_dir / "checkpoints")
    return 0 if found is None else found.manifest.step


def test_two_nodes(launcher: Launcher, base: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself: TP2 over two nodes, one rank each, the embedded engine; then what `status` says."""
    code, words = launcher.command("launch", "slurm", *launcher.files({"exclusive": True}), "--wait")
    assert code == 0, words  # exclusive: with --mem=0
    handle = Handle.of(launcher.run_dir)
    assert handle is not None
    status = handle.status()
    assert (status.state, status.slurm, status.restarts) == ("done", "COMPLETED", 0)
    same_as(base, launcher)
    assert cli.main(["status", str(launcher.run_dir)]) == 0
    words = capsys.readouterr().out
    assert f"step        {STEPS} of {STEPS}" in words and f"checkpoint  step {STEPS}" in words
    assert "last error  none" in words and f"done (Slurm job {handle.jobs[0]})" in words
    assert cli.main(["launch", "slurm", *launcher.files({})]) == 2
    assert "already holds a run" in complaint(capsys.readouterr().err)
    assert cli.main(["stop", str(launcher.run_dir)]) == 2
    assert "is not running" in complaint(capsys.readouterr().err)


def test_time_limit(launcher: Launcher, base: list[dict[str, Any]]) -> None:
    """A limit of two minutes that Slurm announces in the first half of it; a later notice by hand."""
    first_waits = "rewards.default.function=loop_rewards:until_noticed"
    handle = launcher.submit(first_waits, site={"time": "00:02:00", "end_notice_s": 59}, checkpoint={"every": 0})
    (job,) = handle.jobs
    launcher.until(lambda: launcher.restarts(job) == 1, "requeue")
    first = newest_checkpoint(launcher)
    assert first == launcher.steps() and 0 < first < STEPS
    launcher.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    launcher.until(lambda: launcher.steps() > first, "step of the second life")
    launcher.cluster.run("scancel", "--signal=USR1", job)
    status = launcher.ended(handle)
    assert status.state == "done" and status.restarts >= 2
    same_as(base, launcher)


def test_cancelled(launcher: Launcher) -> None:
    """By Slurm's own command, which Slurm calls CANCELLED: not done, though nothing of it failed."""
    handle = launcher.submit(SLOWLY, steps=1000)
    launcher.until(lambda: launcher.steps(), "step")
    launcher.cluster.run("scancel", handle.jobs[0])
    status = launcher.ended(handle)
    assert (status.state, status.slurm) == ("unfinished", "CANCELLED")


def test_node_set_down(launcher: Launcher, base: list[dict[str, Any]]) -> None:
    """Slurm queues the job again by itself; what was made since the last checkpoint is made again."""
    handle = launcher.submit(SLOWLY, checkpoint={"every": 2})
    (job,) = handle.jobs
    launcher.until(lambda: newest_checkpoint(launcher) >= 2, "checkpoint")
    launcher.cluster.down("node2")
    try:
        launcher.until(lambda: launcher.restarts(job) == 1, "requeue")
        assert handle.status().state in ("pending", "running")
    finally:
        launcher.cluster.resume("node2")
    assert launcher.ended(handle).state == "done"
    same_as(base, launcher)


def test_chain_and_stop(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    """Where jobs may not queue themselves again: the second goes on; stopped, it leaves the third nothing to do."""
    handle = launcher.submit(SLOWLY, links=3, steps=1000)
    first, second, third = handle.jobs
    launcher.until(lambda: launcher.steps(), "step")
    assert "Dependency" in launcher.cluster.job(second)["Reason"]
    launcher.cluster.run("scancel", "--signal=USR1", first)
    launcher.until(lambda: launcher.cluster.job(first)["JobState"] == "COMPLETED", "end of the first")
    before = launcher.steps()
    assert launcher.restarts(first) == 0 and newest_checkpoint(launcher) == before
    launcher.until(lambda: launcher.steps() > before, "step of the second")
    assert cli.main(["stop", str(launcher.run_dir)]) == 0
    assert "ends after its step" in capsys.readouterr().out
    status = launcher.ended(handle)
    assert (status.state, status.job) == ("stopped", second)
    assert newest_checkpoint(launcher) == launcher.steps() < 1000
    assert launcher.cluster.job(third)["JobState"] == "CANCELLED"
