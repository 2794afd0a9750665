"""A resumed run says what was changed, and does not become another run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.run_status import describe, look
from lens_megatron import endings, resuming, strict
from lens_megatron.config import RunConfig, load_run
from lens_megatron.errors import RunError, Terminated, UsageError
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import run_tree, write_run
from tests.test_checkpoints import write as write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, run_tree(tmp_path, tmp_path / "run"))


def tree_of(run: Path, *overrides: str) -> dict[str, object]:
    return strict.to_tree(RunConfig, load_run(run, overrides))


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(tree_of(run))
    write_checkpoint(folder.checkpoints, 2)
    return folder


def test_each_change_is_a_line(folder: RunFolder, run: Path) -> None:
    assert resuming.changes(folder, tree_of(run)) == []
    lines = resuming.changes(folder, tree_of(run, "steps=9", "optimizer.lr=0.5", "run_dir=moved", "reference=other"))
    assert lines == [
        "resumed with a change: steps was 2 and is 9",
        "resumed with a change: reference was null and is other",
        "resumed with a change: optimizer.lr was 0.01 and is 0.5",
    ]


def test_what_an_older_configuration_does_not_say_is_the_default(folder: RunFolder, run: Path) -> None:
    tree = folder.read_config()
    del tree["guards"]
    folder.write_config(tree)
    assert resuming.changes(folder, tree_of(run)) == []
    folder.write_config({**tree, "of_another_version": 1})
    [line] = resuming.changes(folder, tree_of(run))
    assert "unknown key 'of_another_version'" in line


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=7", "seed was 0 and is 7"),
        ("data.prompts_per_step=8", "data.prompts_per_step was 4 and is 8"),
        ("data.shuffle=false", "data.shuffle was True and is False"),
        ("algorithm.rescue.gamma=0.3", "algorithm.rescue.gamma was 0.1 and is 0.3"),
        ("algorithm=grpo", "algorithm.rescue.mode was"),
    ],
)
def test_what_would_be_another_run_is_refused(folder: RunFolder, run: Path, change: str, says: str) -> None:
    with pytest.raises(UsageError, match="cannot be resumed as another run") as refused:
        resuming.changes(folder, tree_of(run, change, "optimizer.lr=0.5"))
    assert says in str(refused.value)
    assert "optimizer" not in str(refused.value)


def test_before_the_first_checkpoint_everything_may_change(run: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(tree_of(run))
    assert resuming.changes(folder, tree_of(run, "seed=7")) == ["resumed with a change: seed was 0 and is 7"]


def test_status_of_a_run_without_a_scheduler(folder: RunFolder, run: Path) -> None:
    folder.append_metrics({"step": 0, "eval/average": 0.5})  # the evaluation before the first step is no step
    folder.append_metrics({"step": 1, "reward": 0.5})
    folder.close()
    assert look(folder.path)["state"] == "unfinished"
    with pytest.raises(RunError), endings.noted(folder):
        raise RunError("the disk\nis full")
    found = look(folder.path)
    assert (found["state"], found["reason"]) == ("failed", "the disk is full")
    assert ("reason", "the disk is full") in list(describe(found))
    endings.note_silent_end(str(folder.path), "failed", "silently")
    assert look(folder.path)["reason"] == "the disk is full", "rank 0 knows better"

    folder.begin(tree_of(run))  # goes on
    assert folder.read_ending() is None
    for code in (0, 2, 86):
        assert endings.noted_workers(str(folder.path), lambda code=code: code) == code
        assert folder.read_ending() is None
    assert endings.noted_workers(str(folder.path), lambda: 1) == 1
    assert noted(folder)[0] == "failed"

    folder.begin(tree_of(run))
    with pytest.raises(KeyboardInterrupt):
        endings.noted_workers(str(folder.path), raising(KeyboardInterrupt()))
    assert noted(folder) == ("unfinished", "interrupted")
    folder.begin(tree_of(run))
    with pytest.raises(Terminated):
        endings.noted_workers(str(folder.path), raising(Terminated("ended by SIGTERM")))
    assert noted(folder) == ("failed", "ended by SIGTERM")

    folder.write_ending("done")
    assert look(folder.path)["state"] == "done"


def test_nothing_is_noted_of_a_start_that_leaves_no_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(UsageError), endings.noted(folder):
        raise UsageError("empty data")
    endings.note_silent_end(str(folder.path), "failed", "silently")
    assert folder.read_ending() is None


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


def noted(folder: RunFolder) -> tuple[str, str]:
    deadline = time.monotonic() + 10.0  # it is not waited for long
    while folder.read_ending() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    found = look(folder.path)
    return found["state"], found["reason"]
