"""Whole batch scripts against files: what pyxis, colocated and large jobs get is seen here, since no test cluster has them.

LENS_WRITE_GOLDEN=1 writes the files anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launchers.jobs import JOBS

pytest.importorskip("nemo_run", reason="nemo-run is not installed: make test-slurm")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_home_of_nemo_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMORUN_HOME", raising=False)


@pytest.mark.parametrize("name", JOBS)
def test_golden(name: str) -> None:
    from launchers import nemo

    script = nemo.batch_script(JOBS[name])
    path = GOLDEN / f"{name}.sh"
    if os.environ.get("LENS_WRITE_GOLDEN"):
        path.write_text(script)
    assert script == path.read_text()


def test_no_golden_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sh")} == set(JOBS)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sh")), ids=lambda path: path.stem)
def test_bash_reads_all_of_it(path: Path) -> None:
    texts = [path.read_text(), *re.findall(r"<<'END_OF_SCRIPT'\n(.*?)\nEND_OF_SCRIPT", path.read_text(), re.DOTALL)]
    assert len(texts) >= 2
    for text in texts:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_no_key_on_a_command_line() -> None:
    for path in GOLDEN.glob("*.sh"):
        assert "api" not in path.read_text().lower()


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("home", ["", "shared"])
def test_what_is_submitted_is_what_a_dry_run_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: int, home: str
) -> None:
    """Nothing of the launching machine's home: it need not be there on the nodes."""
    from launchers import nemo

    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 12\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if home:
        monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / home))
    one = replace(JOBS["1-node-container"], run_dir=tmp_path / "run")
    one.launch.mkdir(parents=True)
    jobs = [replace(one, link=link, links=links) for link in range(1, links + 1)]
    for submission in (1, 2):
        shown = [_lines(nemo.batch_script(job)) for job in jobs]
        assert nemo.submit(jobs) == ["12"] * links
        names = ["sbatch.sh"] if links == 1 else [f"sbatch-{job.link}.sh" for job in jobs]
        for job, name, lines in zip(jobs, names, shown, strict=True):
            script = (one.launch / name).read_text()
            assert _lines(script) == lines
            task = f"{job.name}-{job.link}" if links > 1 else job.name
            place = tmp_path / home if home else one.launch / "nemo"
            folder = place / "experiments" / job.name / f"{job.name}_{submission}"
            assert f"{folder / task}:/nemo_run" in script and f'[ -d "{folder}" ]' in script
            assert (folder / task).is_dir()
    assert not (tmp_path / "home").exists()


def _lines(script: str) -> list[str]:
    """Without what differs: the dependency, and the command by which it was submitted."""
    return [line for line in script.splitlines() if not line.startswith(("#SBATCH --dependency", "# Run with"))]
