"""A job with a greater right to the nodes: the run makes room, and goes on when they are free again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from launchers import queue
from tests.slurm.conftest import STEPS, Launcher
from tests.slurm.test_long_runs import SLOWLY, newest_checkpoint, same_as

pytestmark = pytest.mark.slurm


@contextlib.contextmanager
def urgent(launcher: Launcher) -> Iterator[str]:
    """Takes both nodes from a partition of lower rank, and keeps them until the end."""
    words = ["--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]
    job = launcher.cluster.run("sbatch", "--partition=debug", *words).strip()
    try:
        launcher.until(lambda: launcher.cluster.job(job)["JobState"] == "RUNNING", "room for the urgent job")
        yield job
    finally:
        launcher.cluster.run("scancel", job)


@pytest.mark.parametrize(
    ("partition", "end_notice_s", "every"),
    [("with_grace", 30, 0), ("with_grace", 0, 2), ("without_grace", 30, 2)],
    ids=["by the job's signal", "by SIGTERM", "without a grace time"],
)
def test_preempted(
    launcher: Launcher, base: list[dict[str, Any]], partition: str, end_notice_s: int, every: int
) -> None:
    """Slurm queues no job again that ends by itself within the grace time, and calls one that fails then FAILED. With
    preempt_send_user_signal a job that has a signal gets it, and the run ends with a checkpoint; else SIGTERM, which
    costs what was made since the last one."""
    site = {"partition": partition, "end_notice_s": end_notice_s}
    handle = launcher.submit(SLOWLY, site=site, checkpoint={"every": every})
    (job,) = handle.jobs
    launcher.until(lambda: launcher.steps() >= 3, "third step")
    with urgent(launcher):
        assert handle.status().state == "pending" and launcher.restarts(job) == 1
        assert queue.outcome(launcher.run_dir).state == "unfinished"
        made, kept = launcher.steps(), newest_checkpoint(launcher)
        assert 0 < kept <= made < STEPS and (kept == made or every > 0)
    status = launcher.ended(handle)
    assert (status.state, status.restarts) == ("done", 1)
    same_as(base, launcher)
