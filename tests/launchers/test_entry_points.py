"""nemo-run's command line and plain calls lead to the same batch script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lens_megatron import cli
from tests.loop.runs import run_tree, write_run, write_task

pytest.importorskip("nemo_run", reason="nemo-run is not installed: make test-slurm")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    site = folder / "site.yaml"
    site.write_text(yaml.safe_dump({"partition": "debug", "gpus_per_node": 4}))
    return write_run(folder, run_tree(write_task(folder), folder / "run", steps=1)), site


def test_the_same_script(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, site = files
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "loop")])  # where its reward function is
    monkeypatch.setenv("PYTHONPATH", path)
    assert cli.main(["launch", "slurm", str(run), "--site", str(site), "--dry-run", "site.time=00:20:00"]) == 0
    ours, beside = capsys.readouterr()
    assert beside.startswith("nodes    1\nranks    2, 2 a node: tp=2") and "warning: 2 of the 4 GPUs" in beside
    assert ours.startswith("#!/bin/bash\n") and "#SBATCH --time=00:20:00" in ours and "--ntasks=2" in ours
    arguments = [f"config={run}", f"site={site}", "overrides=['site.time=00:20:00']", "--dryrun", "--yes"]
    done = subprocess.run(
        [sys.executable, "-m", "launchers.entry_points", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path.cwd(),
    )
    assert ours.strip() in done.stdout, done.stdout + done.stderr
    assert not (run.parent / "run").exists()  # a dry run leaves nothing


def test_dry_run_here(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "local", str(files[0]), "--dry-run", "steps=3"]) == 0
    assert capsys.readouterr().out == f"lens-megatron train {files[0]} steps=3\n"
