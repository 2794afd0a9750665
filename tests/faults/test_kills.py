"""Any process of a run killed at any time, again and again: it ends with the metrics of the undisturbed run.

LENS_KILLS says how many kills: `LENS_KILLS=50 pytest -m soak`. By hand, and not seen passing yet.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from lens_megatron import checkpoints, recorder
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import PATIENCE_S, Command, decided, finished, metrics, run_tree, started, train, write_run

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
KILLS = int(os.environ.get("LENS_KILLS", "3"))
STEPS = max(6, KILLS)
SAVING = {"every": 1, "keep": 2, "asynchronous": True}


def kind_of(process: psutil.Process, command: Command) -> str:
    words = " ".join(process.cmdline())
    if process.pid == command.process.pid:
        return "command"
    if "rewards.worker" in words:
        return "reward worker"
    if "resource_tracker" in words:
        return ""
    if "spawn_main" in words:
        return "driver"
    return f"rank {process.environ().get('RANK', '?')}"


def victims(command: Command) -> list[tuple[str, psutil.Process]]:
    found = []
    for process in [psutil.Process(command.process.pid), *command.look_around()]:
        try:
            if kind := kind_of(process, command):
                found.append((kind, process))
        except psutil.Error:
            continue
    return found


def one_life(command: Command, run_dir: Path, chance: random.Random) -> str | None:
    """Kills something and waits for the end; what it was, or None when the run was over before."""
    before, deadline = len(metrics(run_dir)), time.monotonic() + PATIENCE_S
    while chance.random() < 0.8 and len(metrics(run_dir)) == before and command.process.poll() is None:
        assert time.monotonic() < deadline, command.words()
        command.look_around()
        time.sleep(0.05)
    time.sleep(chance.random() * (1.0 if len(metrics(run_dir)) > before else 6.0))
    if command.process.poll() is not None:
        return None
    # a kind first: there are more reward workers than ranks
    there = victims(command)
    kind = chance.choice(sorted({kind for kind, _ in there}))
    with contextlib.suppress(psutil.Error):  # it ended by itself meanwhile
        chance.choice([process for name, process in there if name == kind]).send_signal(signal.SIGKILL)
    if kind == "reward worker":  # the run outlives it
        time.sleep(chance.random())
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGKILL)
    command.process.wait(PATIENCE_S)
    command.nobody_left(30.0)
    return kind


def test_random_kills_change_nothing(task: Path, tmp_path: Path) -> None:
    expected = train(tmp_path / "base", run_tree(task, tmp_path / "base" / "run", steps=STEPS))
    run_dir = tmp_path / "run"
    run = str(write_run(tmp_path, run_tree(task, run_dir, steps=STEPS, checkpoint=SAVING)))
    seed = int(os.environ.get("LENS_KILL_SEED", time.time_ns() % 2**32))
    chance, killed = random.Random(seed), []
    while len(killed) < KILLS:
        with started(tmp_path, "train", "--continue", run) as command:
            kind = one_life(command, run_dir, chance)
        if kind is None:
            break
        killed.append(kind)
        lines = metrics(run_dir)
        assert [decided(tree) for tree in lines] == [decided(tree) for tree in expected[: len(lines)]], (seed, killed)
        assert checkpoints.newest_first(run_dir / "checkpoints")[1] == [], (seed, killed)
    code, words = finished(tmp_path, "train", "--continue", run)
    assert code == 0, (seed, killed, words)
    assert [decided(tree) for tree in metrics(run_dir)] == [decided(tree) for tree in expected], (seed, killed)
    assert RunFolder.open(run_dir).rollout_steps() == list(range(1, STEPS + 1))
    events = recorder.read(run_dir / "logs" / "recorder" / "rank_00000.txt")
    assert (events[-1].step, events[-1].what) == (STEPS, "save")
    print(f"{len(killed)} kills, seed {seed}: { ({kind: killed.count(kind) for kind in sorted(set(killed))}) }")
    assert len(killed) >= min(KILLS, 2), killed
