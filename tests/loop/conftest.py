from __future__ import annotations

from pathlib import Path

import pytest

from tests.loop.runs import STEPS, run_tree, train, write_task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def base(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("base")
    every = {"every": 1, "keep": STEPS, "asynchronous": True}
    lines = train(folder, run_tree(task, folder / "run", steps=STEPS, checkpoint=every))
    assert [tree["step"] for tree in lines] == list(range(1, STEPS + 1))
    return folder / "run"
