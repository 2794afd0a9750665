"""`lens-megatron study` with a job a cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_megatron import cli
from lens_megatron.studies import running
from tests.slurm.conftest import Launcher

pytestmark = pytest.mark.slurm


def study_file(launcher: Launcher) -> Path:
    launcher.files({"time": "00:03:00"}, steps=2, parallel={"tp": 1})
    arms = [
        {"name": "grpo", "set": {"algorithm": "grpo"}},
        {"name": "lens", "grid": {"nodes": [2]}},
        {"name": "broken", "set": {"rewards.default.function": "loop_rewards:broken"}, "grid": {"nodes": [1]}},
    ]
    path = launcher.folder / "STUDY.yaml"
    tree = {
        "run": "RUN.yaml",
        "site": "site.yaml",
        "study_dir": str(launcher.folder / "study"),
        "where": "slurm",
        "at_once": 4,
        "gpus_a_node": 1,
        "grid": {"nodes": [1, 2]},
        "arms": arms,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    with path.open(newline="") as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def jobs(study: Path) -> dict[str, str]:
    return {
        path.parents[1].name: json.loads(path.read_text())["jobs"][0] for path in study.glob("cells/*/launch/jobs.json")
    }


def test_cells_are_jobs_on_one_node_and_on_two(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "_POLL_S", 0.2)
    path, folder = study_file(launcher), launcher.folder / "study"
    assert cli.main(["study", str(path)]) == 1
    words = capfd.readouterr().out
    of = jobs(folder)
    assert sorted(of) == ["broken-nodes1", "grpo-nodes1", "grpo-nodes2", "lens-nodes2"]
    assert len(set(of.values())) == 4
    failure = f"job {of['broken-nodes1']} failed: "
    assert f"failed cell broken-nodes1: {failure}" in words and "the judge is broken" in words
    assert words.count("]") == 4, f"a line for each cell: {words}"
    cells = rows(folder / "cells.csv")
    expected = {"broken-nodes1": "failed", "grpo-nodes1": "done", "grpo-nodes2": "done", "lens-nodes2": "done"}
    assert {name: row["state"] for name, row in cells.items()} == expected
    assert cells["broken-nodes1"]["reason"].startswith(failure)
    for name in ("grpo-nodes1", "grpo-nodes2", "lens-nodes2"):
        nodes = name[-1]
        assert launcher.cluster.job(of[name])["NumNodes"] == nodes == cells[name]["gpus"]
        assert cells[name]["steps"] == "2" and float(cells[name]["step_seconds"]) > 0
    assert 'id="measured"' in (folder / "study.html").read_text()

    # what is done stays; what failed is a new job
    assert cli.main(["study", str(path)]) == 1
    assert "3 of 4 cells are done already" in capfd.readouterr().out
    again = jobs(folder)
    assert {name for name in of if again[name] != of[name]} == {"broken-nodes1"}


def test_a_cell_that_can_never_start(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two nodes of a partition of one: told apart from a job that waits its turn, and taken from the queue."""
    monkeypatch.setattr(running, "_POLL_S", 0.2)
    monkeypatch.setattr(running, "_HOPELESS_S", 1.0)
    path, folder = study_file(launcher), launcher.folder / "study"
    site = launcher.folder / "site.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "partition": "one"}))
    assert cli.main(["study", str(path), "--only", "lens-*"]) == 1
    (job,) = jobs(folder).values()
    words = capfd.readouterr().out
    assert f"failed cell lens-nodes2: job {job} cancelled: Slurm says PartitionNodeLimit: it asks for more" in words
    assert launcher.cluster.job(job)["JobState"] == "CANCELLED"
