"""`lens-megatron check` as a user starts it: what it says of a sound run, and of one with a fault."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.loop.runs import REPOSITORY, complaint, finished, run_tree, write_run

pytestmark = pytest.mark.long
# read by every Python that starts; the fault is planted in the ranks alone
PLANTING = """
import os, sys
plant = os.environ.get("LENS_TEST_PLANT")
if plant and "RANK" in os.environ and "lens_megatron.cli" in sys.orig_argv and os.environ.get("LENS_TEST_RUN") in sys.orig_argv:
    from tests.faults.plants import PLANTS
    planted = PLANTS[plant]()
    planted.__enter__()
"""


def test_what_it_says(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PLANTING)
    path = [str(tmp_path / "site"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    runs = {
        name: write_run(tmp_path / name, run_tree(task, tmp_path / name / "run", steps=400))
        for name in ("sound", "faulty")
    }
    monkeypatch.setenv("LENS_TEST_PLANT", "gate_and_up_swapped")
    monkeypatch.setenv("LENS_TEST_RUN", str(runs["faulty"]))
    with ThreadPoolExecutor(2) as pool:
        ends = {name: pool.submit(finished, tmp_path / name, "check", str(run)) for name, run in runs.items()}
    code, words = ends["sound"].result()
    assert code == 0, words
    assert "check passed: two steps, a checkpoint and its resume in the layout of lens" in words
    assert "guards that held: hf_parity, export_parity, " in words
    assert not list((tmp_path / "sound").glob("run*")), "it leaves nothing"
    code, words = ends["faulty"].result()
    assert code == 1, words
    assert "guard hf_parity: the policy in this layout does not compute what" in complaint(words)
