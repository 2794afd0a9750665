"""Runs that are killed, told to end, or lose a part of themselves: nothing lost, nobody left, one clear line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import checkpoints
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import (
    STEPS,
    Command,
    as_of,
    complaint,
    decided,
    finished,
    metrics,
    rollouts,
    run_tree,
    started,
    train,
    write_run,
)

pytestmark = pytest.mark.long
EVERY_STEP = {"every": 1, "keep": STEPS, "asynchronous": True}
BOUND_S = 60.0  # from the blow to the end of the command, on a busy machine


def equal_so_far(run_dir: Path, base: Path) -> int:
    """How many steps a run has; all are the uninterrupted run's, and every visible checkpoint is whole."""
    lines, expected = metrics(run_dir), RunFolder.open(base).read_metrics()
    assert [decided(tree) for tree in lines] == [decided(tree) for tree in expected[: len(lines)]]
    _, broken = checkpoints.newest_first(run_dir / "checkpoints")
    assert broken == []
    return len(lines)


def test_killed_again_and_again(task: Path, base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = str(write_run(tmp_path, run_tree(task, run_dir, steps=STEPS, checkpoint=EVERY_STEP)))
    chance = random.Random(os.getpid())

    def being_written() -> bool:
        return any((run_dir / "checkpoints").glob("*.partial"))

    with started(tmp_path, "train", run) as command:  # in a step
        command.until(lambda: metrics(run_dir), "a step")
        time.sleep(delay := chance.random() * 0.5)
        command.kill_all()
    steps = equal_so_far(run_dir, base)
    assert steps < STEPS, f"killed too late, after {delay:.2f} s"

    with started(tmp_path, "train", "--resume", run) as command:  # in a checkpoint; the command alone
        command.until(lambda: len(metrics(run_dir)) > 1 and being_written(), "a checkpoint")
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
        command.nobody_left()
    equal_so_far(run_dir, base)

    with started(tmp_path, "train", "--resume", run, "checkpoint.asynchronous=false") as command:
        before = len(metrics(run_dir))
        command.until(lambda: len(metrics(run_dir)) > before and being_written(), "a checkpoint")
        command.kill_all()
    equal_so_far(run_dir, base)

    code, words = finished(tmp_path, "train", "--resume", run)
    assert code == 0, words
    assert equal_so_far(run_dir, base) == STEPS
    folder = RunFolder.open(run_dir)
    assert folder.rollout_steps() == list(range(1, STEPS + 1))
    last = f"step_{STEPS:06d}"
    assert (run_dir / "checkpoints" / last / "manifest.json").exists()
    assert not any("." in path.name for path in (run_dir / "checkpoints").iterdir())
    for step in (2, STEPS):
        assert [(r.roll_tokens, r.response, r.reward, r.advantage, r.origin) for r in rollouts(run_dir, step)] == [
            (r.roll_tokens, r.response, r.reward, r.advantage, r.origin) for r in rollouts(base, step)
        ]


def numbers(tree: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in decided(tree).items() if value is not None}


def test_resumed_in_another_layout(task: Path, base: Path, tmp_path: Path) -> None:
    run_dir = as_of(base, 2, tmp_path / "run")
    set_noise_floor(
        run_dir / "checkpoints" / "step_000002", 12.0
    )  # another layout has another one: it is measured anew
    damaged = damaged_checkpoint(run_dir / "checkpoints" / "step_000002", 9)
    changes = {"steps": 5, "parallel": {"tp": 1, "pp": 2}}
    lines = train(tmp_path, run_tree(task, run_dir, checkpoint={"every": 0, "keep": 1}, **changes), "--resume")
    # the one that only looked whole is not kept in place of those that are
    kept = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert kept == {"step_000005", f"{damaged.name}.damaged"}
    expected = RunFolder.open(base).read_metrics()[:5]
    assert [tree["step"] for tree in lines] == [1, 2, 3, 4, 5]
    for tree, other in zip(lines, expected, strict=True):
        assert numbers(tree) == pytest.approx(numbers(other), rel=1e-4, abs=1e-4)
        assert {name for name in decided(tree) if tree[name] is None} == {n for n in decided(other) if other[n] is None}


def damaged_checkpoint(good: Path, step: int) -> Path:
    """A newer one with other contents of the same sizes: only loading finds out."""
    folder = shutil.copytree(good, good.with_name(f"step_{step:06d}"))
    for tensors in folder.glob("*.distcp"):
        tensors.write_bytes(b"\x5a" * tensors.stat().st_size)
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**tree, "step": step}))
    return folder


def set_noise_floor(checkpoint: Path, value: float) -> None:
    state, manifest = checkpoint / "extra.json", checkpoint / "manifest.json"
    assert json.loads(state.read_text())["noise_floor"] < 1
    state.write_text(json.dumps({**json.loads(state.read_text()), "noise_floor": value}))
    tree = json.loads(manifest.read_text())
    tree["files"]["extra.json"] = state.stat().st_size
    manifest.write_text(json.dumps(tree))


def blow(how: str, command: Command) -> int:
    """The exit code that follows."""
    if how == "terminate":  # a scheduler tells the command; the workers hear of it from there
        command.process.terminate()
        return 1
    if how == "interrupt":  # Ctrl-C: the terminal tells every process
        os.killpg(command.process.pid, signal.SIGINT)
        return 130
    if how == "driver":
        command.member("spawn_main", RANK="0").kill()
    else:
        command.member("lens_megatron.cli", RANK=how).kill()
    return 1


@pytest.mark.parametrize(("how", "word"), [("terminate", "failed: ended by SIGTERM"), ("interrupt", "interrupted")])
def test_ended_before_there_is_a_run(task: Path, tmp_path: Path, how: str, word: str) -> None:
    """There is nothing to resume, so that is not what is advised."""
    run_dir = tmp_path / "run"
    with started(tmp_path, "train", str(write_run(tmp_path, run_tree(task, run_dir)))) as command:
        command.until(run_dir.exists, "a run folder")
        expected = blow(how, command)
        assert command.ends(BOUND_S) == expected
        command.nobody_left()
    assert f"{word}; start it again" in command.words().splitlines()
    assert not RunFolder(run_dir).holds_run()


@pytest.mark.parametrize("how", ["terminate", "interrupt", "driver", "0", "1"])
def test_ended_from_outside(task: Path, base: Path, tmp_path: Path, how: str) -> None:
    run_dir = as_of(base, 2, tmp_path / "run")
    RunFolder(run_dir).rewind(2)
    run = str(write_run(tmp_path, run_tree(task, run_dir, steps=400, checkpoint=EVERY_STEP)))
    with started(tmp_path, "train", "--resume", run) as command:
        command.until(lambda: len(metrics(run_dir)) > 2, "a resumed step")
        expected = blow(how, command)
        code = command.ends(BOUND_S)
        command.nobody_left()
    words = command.words()
    assert code == expected, words
    if how == "interrupt":
        assert "Traceback" not in words
        assert words.splitlines().count("interrupted; go on with --resume from the last whole checkpoint") == 1
    else:
        reason = {"terminate": "SIGTERM", "driver": "rollout driver", "0": "rank 0", "1": "rank 1"}[how]
        assert reason in complaint(words), words
    state, reason = ending_of(run_dir)
    assert state == ("unfinished" if how == "interrupt" else "failed")
    assert how != "interrupt" or reason == "interrupted"
    lines = metrics(run_dir)
    expected_lines = RunFolder.open(base).read_metrics()
    assert len(lines) > 2
    for tree, other in zip(lines, expected_lines, strict=False):
        assert decided(tree) == decided(other)
    assert checkpoints.newest_first(run_dir / "checkpoints")[1] == []


def ending_of(run_dir: Path) -> tuple[str, str]:
    deadline = time.monotonic() + 10.0  # the command does not wait long for its note
    while (ending := RunFolder(run_dir).read_ending()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ending is not None
    return ending


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """mount(folder, KiB): a disk that is soon full."""
    mounted: list[Path] = []

    def mount(folder: Path, kib: int) -> Path:
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("a small file system can be mounted by root only")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small file system can be mounted by root only")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_disk_full_of_metrics(task: Path, base: Path, tmp_path: Path, small_disk: Any) -> None:
    run_dir = small_disk(tmp_path / "run", 96)
    tree = run_tree(task, run_dir, steps=100)
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 1
    assert "No space left" in complaint(words)
    assert str(run_dir) in complaint(words)
    assert equal_so_far(run_dir, base) > 0
    folder = RunFolder.open(run_dir)
    assert set(range(1, len(metrics(run_dir)) + 1)) <= set(folder.rollout_steps())
    for step in folder.rollout_steps():
        assert rollouts(run_dir, step)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_full_of_checkpoints(task: Path, base: Path, tmp_path: Path, small_disk: Any, asynchronous: bool) -> None:
    run_dir = tmp_path / "run"
    small_disk(run_dir / "checkpoints", 1500)  # two and a half
    tree = run_tree(task, run_dir, steps=100, checkpoint={**EVERY_STEP, "asynchronous": asynchronous})
    code, words = finished(tmp_path, "train", str(write_run(tmp_path, tree)))
    assert code == 1
    assert "checkpoint was not written" in complaint(words)
    assert equal_so_far(run_dir, base) >= 3
    whole, _ = checkpoints.newest_first(run_dir / "checkpoints")
    assert [found.manifest.step for found in whole] == [2, 1]
    assert not any((run_dir / "checkpoints").glob("*.partial"))
