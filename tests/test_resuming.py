"""A resumed run says what was changed, and does not become another run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.run_status import describe, look
from lens_megatron import endings, resuming, strict
from lens_megatron.commands import train
from lens_megatron.config import RunConfig, load_run
from lens_megatron.errors import RunError, Terminated, UsageError
from lens_megatron.run_folder import RunFolder
from lens_megatron.trainer import Trainer
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


def test_a_configuration_that_this_version_refuses_is_compared_as_it_stands(folder: RunFolder, run: Path) -> None:
    """A value that did nothing may be refused by now: it is told, and cannot be put back. Another seed is another run."""
    tree = folder.read_config()
    tree["algorithm"]["filter"]["size_factor"] = 2.0
    folder.write_config(tree)
    note, told = resuming.changes(folder, tree_of(run))
    assert "filter.size_factor does nothing" in note
    assert told == "resumed with a change: algorithm.filter.size_factor was 2.0 and is 3.0"
    with pytest.raises(UsageError, match="seed was 0 and is 7"):
        resuming.changes(folder, tree_of(run, "seed=7"))


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


class Finished:
    """A trainer whose run has been resumed from its checkpoint of step 8."""

    first_step = 8

    def __init__(self, config: RunConfig, model: object, folder: RunFolder | None) -> None:
        self.config, self.folder, self.watch = config, folder, self

    nothing_left = Trainer.nothing_left

    def reporting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def rescuing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def resume(self) -> None: ...

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()


def test_when_nothing_is_left_to_do_the_files_stay(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(tree_of(run, "steps=8"))
    folder.append_metrics({"step": 8, "reward": 0.5})
    folder.close()
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    monkeypatch.setattr("lens_megatron.trainer.Trainer", Finished)
    monkeypatch.setattr("lens_megatron.loop.train", lambda *_: pytest.fail("a step was made"))
    again = load_run(run, ["steps=5", "optimizer.lr=0.5"])
    assert train._train(again, None, resume=True, go_on=False) == 0  # type: ignore[arg-type]
    ended = {"ending.json": b'{"state": "done", "reason": ""}\n'}  # it was killed before it could say so
    after = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    assert after == before | {folder.path / name: text for name, text in ended.items()}

    longer = load_run(run, ["steps=9", "optimizer.lr=0.5"])
    monkeypatch.setattr("lens_megatron.loop.train", lambda *_: None)
    assert train._train(longer, None, resume=True, go_on=False) == 0  # type: ignore[arg-type]
    assert folder.read_config()["steps"] == 9
    [(until, earlier)] = folder.read_earlier_configs()
    assert (until, earlier["steps"], earlier["optimizer"]["lr"]) == (8, 8, 0.01)


def test_a_run_that_was_stopped_is_not_done_because_fewer_steps_are_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.begin(tree_of(run, "steps=40"))
    folder.write_ending("stopped")
    folder.close()
    monkeypatch.setattr("lens_megatron.trainer.Trainer", Finished)
    assert train._train(load_run(run, ["steps=5"]), None, resume=True, go_on=False) == 0  # type: ignore[arg-type]
    assert folder.read_ending() == ("stopped", "") and folder.read_config()["steps"] == 40


def test_status_never_says_step_40_of_10(folder: RunFolder, run: Path) -> None:
    folder.append_metrics({"step": 40, "reward": 0.5})
    folder.write_config(tree_of(run, "steps=10"))
    assert dict(describe(look(folder.path)))["step"].startswith("40, ")
    folder.write_config(tree_of(run, "steps=50"))
    assert dict(describe(look(folder.path)))["step"].startswith("40 of 50, ")


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
