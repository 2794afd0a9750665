"""One cluster for the tests, one tiny task, and the run that others are compared with. Run by `make test-slurm` alone."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.queue import Handle, JobStatus
from tests.loop.runs import finished, metrics, run_tree, train, write_run, write_task
from tests.slurm import cluster as clusters

HERE = Path(__file__).parent
STEPS = 8
PATIENCE_S = 120.0


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    if (reason := clusters.missing()) is not None:
        pytest.skip(reason)
    with clusters.running(tmp_path_factory.mktemp("cluster") / "root") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def base(task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of an uninterrupted run on this machine, without Slurm."""
    folder = tmp_path_factory.mktemp("base")
    return train(folder, run_of(task, folder / "run"))


def run_of(task: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A machine that stalls must not make a judgement time out: it would count as 0, and change what follows."""
    tree = run_tree(task, run_dir, **{"steps": STEPS, **changes})
    tree["rewards"] = {**tree["rewards"], "wall_seconds": 600.0}
    return tree


@dataclass
class Launcher:
    """`lens-megatron launch slurm` and its siblings, as a user calls them."""

    cluster: clusters.Cluster
    task: Path
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def files(self, site: dict[str, Any], **run: Any) -> list[str]:
        tree = run_of(self.task, self.run_dir, **run)
        path = self.folder / "site.yaml"
        path.write_text(yaml.safe_dump({**SITE, **site}))
        return [str(write_run(self.folder, tree)), "--site", str(path)]

    def command(self, *arguments: str) -> tuple[int, str]:
        return finished(self.folder, *arguments)

    def submit(self, *overrides: str, links: int = 1, site: dict[str, Any] | None = None, **run: Any) -> Handle:
        """By the plain function: importing nemo-run anew takes longer than a tiny run."""
        from launchers.slurm import submit

        path, _, where = self.files(site or {}, **run)
        return submit(Path(path), overrides, Path(where), links=links)

    def ended(self, handle: Handle) -> JobStatus:
        status = handle.wait(PATIENCE_S, poll_s=0.2)
        assert not status.active, (status, self.logs())
        return status

    def until(self, holds: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s: {self.logs()}"
            time.sleep(0.05)

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])

    def steps(self) -> int:
        return len(metrics(self.run_dir))

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.run_dir.glob("logs/*.out")))


# GLOO_SOCKET_IFNAME: both nodes are this machine
SITE = {
    "partition": "debug",
    "time": "00:05:00",
    "gpus_per_node": 0,
    "ranks_per_node": 1,
    "exclusive": False,
    "end_notice_s": 30,
    "env": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}


def environment(cluster: clusters.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    home = cluster.root / "nemo-home"  # each cluster counts its jobs from 1
    monkeypatch.setenv("NEMORUN_HOME", str(home))
    # nemo-run reads it when it is imported, and another test may have done that
    config = importlib.import_module("nemo_run.config")
    monkeypatch.setattr(config, "_NEMORUN_HOME", str(home))
    scheduler = importlib.import_module("nemo_run.run.torchx_backend.schedulers.slurm")
    monkeypatch.setattr(scheduler, "SLURM_JOB_DIRS", str(home / ".slurm_jobs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE.parent / "loop")]))


@pytest.fixture
def launcher(
    cluster: clusters.Cluster, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launcher]:
    environment(cluster, monkeypatch)
    launcher = Launcher(cluster, task, tmp_path)
    yield launcher
    if (handle := Handle.of(launcher.run_dir)) is not None:
        handle.cancel()
