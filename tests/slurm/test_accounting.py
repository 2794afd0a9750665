"""A cluster that keeps accounts (slurmdbd, MariaDB): ends of jobs that slurmctld has forgotten, and nemo-run's own view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launchers import nemo, queue
from lens_megatron import cli
from lens_megatron.machine import Output, run_command
from tests.loop.runs import complaint
from tests.slurm import cluster as clusters
from tests.slurm.conftest import Launcher, environment

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    if (reason := clusters.missing() or clusters.missing_accounting()) is not None:
        pytest.skip(reason)
    with clusters.running(tmp_path_factory.mktemp("accounts") / "root", accounting=True) as cluster:
        yield cluster


def test_ends_of_jobs_from_accounting(
    accounts: clusters.Cluster,
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    environment(accounts, monkeypatch)
    cells = {name: Launcher(accounts, task, tmp_path / name) for name in ("good", "bad")}
    for cell in cells.values():
        cell.folder.mkdir()
    data = tmp_path / "bad.jsonl"
    data.write_text("{}\n")
    site = {"account": "lab"}
    good = cells["good"].submit("site.time=00:03:00", site=site, steps=1, parallel={"tp": 1})
    bad = cells["bad"].submit(f"data.train={data}", site={**site, "check_inputs": False}, steps=1, parallel={"tp": 1})
    assert cells["good"].ended(good).state == "done" and cells["bad"].ended(bad).state == "failed"

    def forgetful(command: Sequence[str]) -> Output | None:
        return Output(False, "Invalid job id specified") if command[0] == "scontrol" else run_command(command)

    monkeypatch.setattr(queue, "run_command", forgetful)
    for handle in (good, bad):  # accounting alone
        (handle.run_dir / "launch" / "outcome").unlink()
    accounts.until(lambda: good.status().slurm == "COMPLETED" and bad.status().slurm == "FAILED", "accounts")
    assert good.status().state == "done"
    status = bad.status()
    assert status.state == "failed" and str(data) in status.reason

    import nemo_run

    experiments = [
        nemo_run.Experiment.from_id(path.name) for path in (accounts.root / "nemo-home").glob("experiments/run/*")
    ]
    with nemo.without_input():
        states = {
            int(job["job_id"]): job["status"].name
            for experiment in experiments
            for job in (experiment.status(return_dict=True) or {}).values()
        }
    assert states == {int(good.jobs[0]): "SUCCEEDED", int(bad.jobs[0]): "FAILED"}
    capfd.readouterr()

    other = Launcher(accounts, task, tmp_path / "other")
    other.folder.mkdir()
    assert cli.main(["launch", "slurm", *other.files({"account": "nobody"})]) == 2
    assert "Slurm refused the job" in (line := complaint(capfd.readouterr().err)) and "account" in line.lower()
