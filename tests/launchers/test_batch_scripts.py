"""Whole batch scripts against files: what pyxis, colocated and large jobs get is seen here, since no test cluster has them.

LENS_WRITE_GOLDEN=1 writes the files anew; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.launchers.jobs import JOBS

pytest.importorskip("nemo_run", reason="nemo-run is not installed: make test-slurm")
GOLDEN = Path(__file__).parent / "golden"


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
