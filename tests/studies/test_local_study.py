"""Real cells on this machine: one fails, the others do not mind; taken up again, only what is missing runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.loop.runs import finished, run_tree, write_task

pytestmark = pytest.mark.long


def study_tree(task: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    tree = run_tree(task, folder / "unused", parallel={"tp": 1}, steps=1)
    (folder / "RUN.yaml").write_text(yaml.safe_dump(tree))
    tree = {
        "name": "Tiny <study>",
        "run": "RUN.yaml",
        "study_dir": str(folder / "study"),
        "at_once": 2,
        "gpu": "h100",
        "grid": {"seed": [0]},
        "arms": [
            {"name": "grpo", "set": {"algorithm": "grpo", "steps": 2}},
            {"name": "broken", "set": {"rewards.default.function": "loop_rewards:no_such_rule"}},
            {"name": "tp two", "set": {"algorithm": "grpo", "parallel.tp": 2}, "where": "simulated"},
            {"name": "lens"},
        ],
        "target": {"metric": "reward", "value": 0.0},
    }
    path = folder / "STUDY.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(path: Path) -> dict[str, dict[str, Any]]:
    with path.open(newline="") as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def test_cells_run_fail_and_are_taken_up_again(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    task = write_task(tmp_path / "task")
    path = study_tree(task, tmp_path / "here")
    folder = tmp_path / "here" / "study"
    code, words = finished(tmp_path, "study", str(path), "--only", "grpo-*")  # a piece of it
    assert code == 0, words
    assert {name: row["state"] for name, row in rows(folder / "cells.csv").items() if row["state"] != "waiting"} == {
        "grpo-seed0": "done"
    }
    code, words = finished(tmp_path, "study", str(path), "--only", "nothing*")
    assert code == 2 and "no cell has such a name" in words
    code, words = finished(tmp_path, "study", str(path))
    assert code == 1, words
    assert "failed cell broken-seed0: " in words and "no_such_rule" in words
    cells = rows(folder / "cells.csv")
    states = {name: row["state"] for name, row in cells.items()}
    assert states == {
        "grpo-seed0": "done", "broken-seed0": "failed", "tp_two-seed0": "simulated", "lens-seed0": "done",
    }  # fmt: skip
    assert "no_such_rule" in cells["broken-seed0"]["reason"]
    for name in ("grpo-seed0", "lens-seed0"):
        assert float(cells[name]["step_seconds"]) > 0 and float(cells[name]["tokens_per_second_per_gpu"]) > 0
        assert cells[name]["source"] == "measured" and cells[name]["mfu"] == ""  # no GPU did it
        assert float(cells[name]["planned_step_seconds"]) > 0
        assert float(cells[name]["gpu_hours_to_target"]) <= float(cells[name]["gpu_hours"])
    assert cells["tp_two-seed0"]["source"] == "simulated"
    steps = pq.read_table(folder / "steps.parquet").to_pylist()
    assert [(row["cell"], row["step"]) for row in steps] == [("grpo-seed0", 1), ("grpo-seed0", 2), ("lens-seed0", 1)]
    assert pq.read_table(folder / "cells.parquet").num_rows == 4
    page = (folder / "study.html").read_text()
    assert "Tiny &lt;study&gt;" in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    assert 'id="measured"' in page and 'id="simulated"' in page
    measured = page[page.index('id="measured"') : page.index('id="learning"')]
    assert "tp_two" not in measured and "stroke-dasharray" not in measured

    # what is done stays; what failed is tried again
    before = (folder / "cells" / "grpo-seed0" / "metrics.jsonl").stat().st_mtime_ns
    code, words = finished(tmp_path, "study", str(path))
    assert code == 1
    assert "3 of 4 cells are done already" in words and "[4/4] broken-seed0: failed" in words
    assert "grpo-seed0" not in words
    assert (folder / "cells" / "grpo-seed0" / "metrics.jsonl").stat().st_mtime_ns == before
