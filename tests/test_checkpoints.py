"""Checkpoint folders: what counts as whole, what is resumed from, what is kept. A naive model of the rules beside them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron import checkpoints
from lens_megatron.checkpoints import CheckpointConfig, Manifest, Unreadable
from lens_megatron.errors import RunError, UsageError
from lens_megatron.pruning import prune


def write(root: Path, step: int, metrics: dict[str, float] | None = None, content: bytes = b"weights") -> Path:
    folder = checkpoints.step_folder(root, step)
    partial = checkpoints.begin(folder)
    (partial / "hf").mkdir()
    files = {
        "tensors.distcp": checkpoints.write_file(partial / "tensors.distcp", content),
        "hf/config.json": checkpoints.write_file(partial / "hf" / "config.json", b"{}"),
    }
    manifest = Manifest(step, {"layers": 4, "moe": None}, {"tp": 2}, 2, "float32", True, files, metrics or {})
    checkpoints.complete(folder, manifest)
    return folder


def steps(root: Path) -> list[int]:
    return [found.manifest.step for found in checkpoints.newest_first(root)[0]]


def test_visible_only_when_complete(tmp_path: Path) -> None:
    folder = checkpoints.step_folder(tmp_path, 20)
    assert folder.name == "step_000020"
    partial = checkpoints.begin(folder)
    (partial / "tensors.distcp").write_bytes(b"half")
    assert checkpoints.latest(tmp_path) is None
    assert write(tmp_path, 20) == folder  # begins anew: the old half is gone
    assert sorted(p.name for p in folder.iterdir()) == ["hf", "manifest.json", "tensors.distcp"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000020"]
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.folder == folder
    assert found.manifest.files == {"tensors.distcp": 7, "hf/config.json": 2}


def test_steps_are_numbers_not_names(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        write(tmp_path, step)
    assert steps(tmp_path) == [1_000_000, 999_999, 20]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, 20, content=b"old")
    folder = write(tmp_path, 20, content=b"newer")
    assert (folder / "tensors.distcp").read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["step_000020"]


@pytest.mark.parametrize("how", ["shorter", "longer", "missing", "manifest cut", "manifest gone", "other format"])
def test_damage_is_seen(how: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, 20), write(tmp_path, 40)
    file, manifest = bad / "tensors.distcp", bad / "manifest.json"
    if how in ("shorter", "longer"):
        file.write_bytes(b"w" * (6 if how == "shorter" else 8))
    elif how == "missing":
        file.unlink()
    elif how == "manifest cut":
        manifest.write_text(manifest.read_text()[:-10])
    elif how == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "lens-megatron/2"}))
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.folder == good
    (broken,) = checkpoints.newest_first(tmp_path)[1]
    assert broken.step == 40
    assert str(bad) in broken.reason
    # a new start would overwrite what can perhaps be saved
    for path in sorted(good.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    good.rmdir()
    with pytest.raises(RunError, match="no checkpoint can be loaded"):
        checkpoints.latest(tmp_path)
    assert prune(tmp_path, keep=1) == []
    assert bad.is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "tensors.distcp", "step_000040"])
def test_what_the_file_system_does_not_give_is_not_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one would be taken instead, and the run's later steps be lost."""
    write(tmp_path, 20)
    bad = write(tmp_path, 40)
    path = bad if name == bad.name else bad / name
    refusing(monkeypatch, path, errno.EIO)
    for look in (checkpoints.newest_first, checkpoints.latest):
        with pytest.raises(Unreadable) as caught:
            look(tmp_path)
        assert str(caught.value) == f"{path} cannot be read: Input/output error"
    with pytest.raises(Unreadable):  # nor is it removed, as broken ones are
        prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert steps(tmp_path) == [40, 20]


def test_one_that_cannot_be_removed_keeps_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    not_removed(monkeypatch, tmp_path / "step_000010")
    with pytest.raises(RunError, match=r"step_000010: not removed: Permission denied$"):
        prune(tmp_path, keep=2)
    assert steps(tmp_path) == [40, 30, 10]


def test_a_run_goes_on_when_an_old_checkpoint_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lens_megatron.mcore import checkpoint_run

    notes: list[str] = []
    monkeypatch.setattr(checkpoint_run, "on_rank_0", lambda action: action())
    saver = checkpoint_run.Saver(None, tmp_path, CheckpointConfig(keep=1), note=notes.append)  # type: ignore[arg-type]
    for step in (10, 20):
        write(tmp_path, step)
    not_removed(monkeypatch, tmp_path / "step_000010")
    for step in (30, 40):
        write(tmp_path, step)
        saver._ended()
    said = f"old checkpoints stay, the run goes on: {tmp_path / 'step_000010'}: not removed: Permission denied"
    assert notes == [said]
    assert steps(tmp_path) == [40, 10]
    refusing(monkeypatch, tmp_path / "step_000040", errno.EIO)
    saver._ended()
    where = f"{tmp_path / 'step_000040'} cannot be read: Input/output error"
    assert notes == [said, f"old checkpoints stay, the run goes on: {where}"]


def not_removed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)


def refusing(monkeypatch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """Permissions would not keep root from reading."""
    for name in ("stat", "open"):
        action = getattr(Path, name)

        def refuse(self: Path, *arguments: Any, action: Any = action, **options: Any) -> Any:
            if self == path:
                raise OSError(number, os.strerror(number), str(self))
            return action(self, *arguments, **options)

        monkeypatch.setattr(Path, name, refuse)


class Killed(BaseException):
    """Nothing catches it, nothing cleans up after it."""


@pytest.mark.parametrize("step_exists", [False, True])
def test_killed_at_every_touch_of_the_disk(step_exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = 0
    for moment in range(1, 100):
        root = tmp_path / str(moment)
        write(root, 10, content=b"earlier")
        if step_exists:
            write(root, 20, content=b"old")
        left = moment

        def touch(action: Any) -> Any:
            def or_die(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return action(*arguments, **options)

            return or_die

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "open"), (Path, "rename"), (Path, "mkdir"), (os, "fsync"), (shutil, "rmtree")):
                patch.setattr(owner, name, touch(getattr(owner, name)))
            try:
                write(root, 20, content=b"new")
                killed = False
            except Killed:
                killed = True
        checkpoints.clean_leftovers(root)
        whole, broken = checkpoints.newest_first(root)
        contents = [(found.folder / "tensors.distcp").read_bytes() for found in whole]
        assert not broken
        assert not [p for p in root.iterdir() if p.suffix]
        assert contents in ([b"new", b"earlier"], [b"old", b"earlier"] if step_exists else [b"earlier"])
        if not killed:
            assert contents == [b"new", b"earlier"]
            break
        moments += 1
    assert moments > 10


def test_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    write(tmp_path, 20)
    (checkpoints.begin(checkpoints.step_folder(tmp_path, 40)) / "tensors.distcp").write_bytes(b"half")
    write(tmp_path, 60).rename(tmp_path / "step_000060.removed")  # killed while pruning
    write(tmp_path, 80).rename(tmp_path / "step_000080.replaced")  # killed between complete()'s two renames
    (tmp_path / "step_notes.partial").mkdir()  # not ours
    assert steps(tmp_path) == [20]
    assert checkpoints.clean_leftovers(tmp_path) == ["step_000040.partial", "step_000060.removed"]
    assert steps(tmp_path) == [80, 20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000020", "step_000080", "step_notes.partial"]
    assert checkpoints.clean_leftovers(tmp_path / "none") == []


@settings(max_examples=20, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.3, float("nan"), None])), min_size=1, max_size=7
    ),
    keep=st.integers(1, 4),
    use_best=st.booleans(),
)
def test_prune_against_a_naive_model(
    data: list[tuple[bool, float | None]], keep: int, use_best: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("run")
    scores = {}
    for number, (good, score) in enumerate(data, 1):
        folder = write(root, number)
        tree = json.loads((folder / "manifest.json").read_text())
        tree["metrics"] = {} if score is None else {"success": score}
        (folder / "manifest.json").write_text(json.dumps(tree))
        if good:
            scores[number] = score
        else:
            (folder / "tensors.distcp").unlink()
    expected = set(range(1, len(data) + 1))
    if scores:
        best, best_step = -1.0, None
        for number, score in scores.items():
            if score is not None and score == score and score >= best:
                best, best_step = score, number
        spared = set(sorted(scores)[-keep:]) | ({best_step} if use_best and best_step else set())
        expected = {n for n in expected if n in spared or n > max(scores)}
    prune(root, keep, "success" if use_best else None)
    assert {int(p.name.removeprefix("step_")) for p in root.iterdir()} == expected


def test_prune_leaves_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "thesis.txt").write_text("only copy")
    (tmp_path / "final").mkdir()
    for step in (2, 3):
        write(tmp_path, step)
    assert prune(tmp_path, keep=1) == ["step_000002"]
    assert (tmp_path / "step_000001" / "thesis.txt").exists()
    assert (tmp_path / "final").exists()


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"step_000002: the checkpoint was not written \(Not a directory\)") as caught:
        checkpoints.begin(checkpoints.step_folder(tmp_path / "file", 2))
    assert "\n" not in str(caught.value)


def test_other_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    manifest = checkpoints.read_manifest(folder)
    checkpoints.check_same_model(folder, manifest, {"layers": 4, "moe": None})
    with pytest.raises(UsageError, match="layers is 4 there, 8 here"):
        checkpoints.check_same_model(folder, manifest, {"layers": 8, "moe": None})
    with pytest.raises(UsageError, match="moe is None there"):
        checkpoints.check_same_model(folder, manifest, {"layers": 4, "moe": {"experts": 8}})


@pytest.mark.parametrize("bad", [{"every": -1}, {"keep": 0}])
def test_config_refuses(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        dataclasses.replace(CheckpointConfig(), **bad)  # type: ignore[arg-type]


def test_needs_no_torch() -> None:
    code = "import sys, lens_megatron.checkpoints; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
