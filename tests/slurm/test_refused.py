"""What cannot run is said in one line: before it is queued where that can be known, else by `status` and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launchers.slurm import submit
from lens_megatron import cli
from lens_megatron.errors import UsageError
from tests.loop.runs import complaint
from tests.slurm.conftest import Launcher

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
    assert cli.main(["stop", str(launcher.run_dir)]) == 0
    launcher.until(lambda: not handle.status().active, "end")


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
    """A failure of one rank in the middle: a judge that raises after some steps would do; here, data that is gone."""
    data = launcher.folder / "gone.jsonl"
    data.write_text("{}\n")
    handle = launcher.submit(f"data.train={data}")
    status = launcher.ended(handle)
    assert (status.state, status.slurm) == ("failed", "FAILED")
    assert status.reason.startswith("error: ") and str(data) in status.reason
    assert cli.main(["status", str(launcher.run_dir)]) == 0
    words = capsys.readouterr().out
    assert "state       failed" in words and f"reason      {status.reason}" in words


def test_four_cells_one_of_which_fails(launcher: Launcher) -> None:
    """One job a cell, as a study queues them: the failing cell is told from the others, with its reason."""
    handles = []
    for seed, model in enumerate(["model", "model", "not-a-model", "model"]):
        cell = Launcher(launcher.cluster, launcher.task, launcher.folder / f"cell{seed}")
        cell.folder.mkdir()
        overrides = [f"seed={seed}", "site.time=00:03:00"]
        if model != "model":
            overrides.append("rewards.default.function=loop_rewards:not_there")
        handles.append(cell.submit(*overrides, steps=1, parallel={"tp": 1}))
    states = [launcher.ended(handle) for handle in handles]
    assert [status.state for status in states] == ["done", "done", "failed", "done"]
    assert "not_there" in states[2].reason
    assert len({handle.jobs for handle in handles}) == 4
    assert all(
        (Path(h.run_dir) / "metrics.jsonl").exists() for h, s in zip(handles, states, strict=True) if s.state == "done"
    )
