"""What cannot run is said in one line: before it is queued where that can be known, else by `status` and the log."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.slurm import submit
from lens_megatron import cli
from lens_megatron.errors import UsageError
from tests.loop.runs import complaint
from tests.slurm.conftest import STEPS, Launcher

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("site", "run", "message"),
    [
        ({"partition": "gpu"}, {}, "partition 'gpu' is not on this cluster; there are: debug, one"),
        ({"image": "/no/such.sqsh"}, {}, "image /no/such.sqsh: no such file"),
        ({"image": "nvcr.io#nvidia/pytorch"}, {}, "srun here has no --container-image: pyxis is not installed"),
        ({}, {"parallel": {"tp": 3}}, "tp=3 does not divide"),
        ({"ranks_per_node": 2}, {"parallel": {"tp": 1, "dp": 3}}, "3 ranks do not fill nodes of 2"),
        ({"reservation": "nobodys"}, {}, "Slurm refused the job: Requested reservation is invalid"),
        ({}, {"model": "/no/model"}, "/no/model"),
        ({}, {"data": {"train": "nofile.jsonl"}}, "data.train: nofile.jsonl: no such file"),
    ],
)
def test_before_anything_is_queued(
    site: dict[str, Any], run: dict[str, Any], message: str, launcher: Launcher, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", "slurm", *launcher.files(site, **run)]) == 2
    assert message in complaint(capfd.readouterr().err)
    assert not launcher.cluster.run("squeue", "--noheader").strip()


def test_job_that_never_starts(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    handle = launcher.submit(site={"partition": "one"})  # of one node; the layout needs two
    launcher.until(lambda: "PartitionNodeLimit" in handle.status().reason, "reason")
    assert cli.main(["status", str(launcher.run_dir)]) == 0
    words = capsys.readouterr().out
    assert "state       pending" in words
    assert "Slurm says PartitionNodeLimit: it asks for more nodes, or more time, than the partition allows" in words
    with pytest.raises(UsageError, match="which is pending: stop it first"):
        submit(launcher.folder / "RUN.yaml", [], launcher.folder / "site.yaml")
    with launcher.cluster.without_controller():
        status = handle.status()
        assert status.reason.startswith("Slurm does not answer: ") and not status.over
    assert handle.status().state == "pending"
    assert cli.main(["stop", str(launcher.run_dir)]) == 0
    launcher.until(lambda: handle.status().over, "end")


def test_setup_that_fails(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    status = launcher.ended(launcher.submit(site={"setup": ["export A=$UNSET", "module load nope", "echo after"]}))
    assert (status.state, status.slurm) == ("failed", "FAILED")
    assert status.reason == "error: setup: exit code 127 of: module load nope"
    assert launcher.cluster.job(status.job)["ExitCode"] == "2:0"
    assert (launcher.run_dir / "launch" / "outcome").read_text().split() == ["failed", "2", f"{status.job}.0"]


def test_run_folder_that_a_node_does_not_share(launcher: Launcher) -> None:
    launcher.run_dir.mkdir()
    launcher.cluster.hide(launcher.run_dir, "node2")
    try:
        status = launcher.ended(launcher.submit())
    finally:
        launcher.cluster.show(launcher.run_dir, "node2")
    assert status.state == "failed"
    expected = f"error: node node2 does not see {launcher.run_dir}: run_dir must lie on storage that all nodes share"
    assert status.reason == expected


def test_run_folder_that_the_first_node_does_not_share(launcher: Launcher) -> None:
    """Then there is not even a log."""
    launcher.run_dir.mkdir()
    launcher.cluster.hide(launcher.run_dir, "node1")
    try:
        status = launcher.ended(launcher.submit())
    finally:
        launcher.cluster.show(launcher.run_dir, "node1")
    assert status.state == "failed" and "run_dir must lie on storage that all nodes share" in status.reason


def test_failing_job_is_failed_with_its_reason(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a run: rank 0 knows why, and the rank on the other node only that it was left alone."""
    status = launcher.ended(launcher.submit("rewards.default.function=loop_rewards:tires"))
    assert 0 < launcher.steps() < STEPS
    assert (status.state, status.slurm) == ("failed", "FAILED")
    assert status.reason.startswith("failed: ") and "the judge is tired" in status.reason
    assert cli.main(["status", str(launcher.run_dir)]) == 0
    words = capsys.readouterr().out
    assert "state       failed" in words and f"reason      {status.reason}" in words
