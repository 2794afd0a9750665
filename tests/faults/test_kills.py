"""Any process of a run killed at any time, again and again: it ends with the metrics of the undisturbed run.

LENS_KILLS says how many kills: `LENS_KILLS=50 pytest -m soak`. By hand; docs/trust.md has what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lens_megatron import checkpoints, recorder
from lens_megatron.run_folder import RunFolder
from tests.loop.runs import PATIENCE_S, Command, decided, finished, metrics, run_tree, started, train, write_run

pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("LENS_KILLS", "3"))
STEPS = 3 * KILLS + 3  # a life makes a step or two
SAVING = {"every": 1, "keep": 2, "asynchronous": True}
BOUND_S = 60.0  # from a kill to the end of the command
EARLY = 0.25  # share of kills while the run starts
OUTLIVED = ("reward worker", "resource tracker")


def kind_of(process: psutil.Process, command: Command) -> str:
    words = " ".join(process.cmdline())
    if process.pid == command.process.pid:
        return "command"
    for kind, word in {"reward worker": "rewards.worker", "resource tracker": "resource_tracker"}.items():
        if word in words:
            return kind
    return "rollout process" if "spawn_main" in words else f"rank {process.environ().get('RANK', '?')}"


def victims(command: Command) -> list[tuple[str, psutil.Process]]:
    found = []
    for process in [psutil.Process(command.process.pid), *command.look_around()]:
        with contextlib.suppress(psutil.Error):
            found.append((kind_of(process, command), process))
    return found


def kill_one(command: Command, chance: random.Random) -> str | None:
    """What it was; a kind is chosen first: there are more reward workers than ranks."""
    there = victims(command)
    if not there:
        return None
    kind = chance.choice(sorted({kind for kind, _ in there}))
    with contextlib.suppress(psutil.Error):  # it ended by itself meanwhile
        chance.choice([process for name, process in there if name == kind]).send_signal(signal.SIGKILL)
        return kind
    return None


def wait_until(happened: Callable[[], bool], command: Command) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened() and command.process.poll() is None:
        assert time.monotonic() < deadline, command.words()
        command.look_around()
        time.sleep(0.02)


def newest_event(run_dir: Path) -> recorder.Event | None:
    path = recorder.path_of(run_dir / "logs", 0)
    events = recorder.read(path) if path.exists() else []
    return events[-1] if events else None


def phase_of(event: recorder.Event | None, before: recorder.Event | None) -> str:
    """What the run was doing, by rank 0's flight recorder."""
    if event is None or event == before:
        return "start"
    return event.what if event.seconds is None else f"after {event.what}"


def one_life(
    command: Command, run_dir: Path, chance: random.Random, most: int, start_s: float, step_s: float
) -> list[tuple[str, str]]:
    """Kills until the run is over: who, and what it was doing."""
    killed: list[tuple[str, str]] = []
    before = newest_event(run_dir)
    while len(killed) < most:
        if chance.random() < EARLY and not killed:
            pause = chance.random() * start_s
        else:
            steps = len(metrics(run_dir))
            wait_until(lambda steps=steps: len(metrics(run_dir)) > steps, command)
            pause = chance.random() * 2 * step_s
        end = time.monotonic() + pause
        wait_until(lambda end=end: time.monotonic() > end, command)
        assert command.process.poll() is None, f"ended by itself after {killed}: {command.words()}"
        phase = phase_of(newest_event(run_dir), before)
        if (kind := kill_one(command, chance)) is None:
            continue
        killed.append((kind, phase))
        if kind in OUTLIVED:
            continue
        code = command.ends(BOUND_S)
        command.nobody_left(30.0)
        complaints = [line for line in command.words().splitlines() if line.startswith(("error:", "failed:"))]
        assert code != 0, command.words()
        assert len(complaints) == (kind != "command"), (killed[-1], command.words())
        break
    return killed


def checked(run_dir: Path, expected: list[dict[str, Any]]) -> int:
    """So far it is the undisturbed run, and what looks like a checkpoint is one; how many steps there are."""
    lines = metrics(run_dir)
    for tree, other in zip(lines, expected, strict=False):
        different = {name for name in {**decided(tree), **decided(other)} if tree.get(name) != other.get(name)}
        assert not different, {name: (tree.get(name), other.get(name)) for name in different}
    assert checkpoints.newest_first(run_dir / "checkpoints")[1] == []
    return len(lines)


def last_sums(run_dir: Path) -> dict[str, int]:
    """Checksums of weights and optimizer in the last checkpoint."""
    return json.loads((run_dir / "checkpoints" / f"step_{STEPS:06d}" / "extra.json").read_text())["guards"]


def test_random_kills_change_nothing(task: Path, tmp_path: Path) -> None:
    base = tmp_path / "base" / "run"
    began = time.monotonic()
    expected = train(tmp_path / "base", run_tree(task, base, steps=STEPS))
    step_s = statistics.median(tree["time/step"] for tree in expected)
    start_s = time.monotonic() - began - sum(tree["time/step"] for tree in expected)
    run_dir = tmp_path / "run"
    run = str(write_run(tmp_path, run_tree(task, run_dir, steps=STEPS, checkpoint=SAVING)))
    seed = int(os.environ.get("LENS_KILL_SEED", time.time_ns() % 2**32))
    print(f"seed {seed}; a start takes {start_s:.1f} s, a step {step_s:.2f} s", flush=True)
    chance, killed, lives = random.Random(seed), list[tuple[str, str]](), 0
    while len(killed) < KILLS:
        with started(tmp_path, "train", "--continue", run) as command:
            killed += one_life(command, run_dir, chance, KILLS - len(killed), start_s, step_s)
            lives += 1
            if killed[-1][0] in OUTLIVED:
                assert command.ends() == 0, command.words()  # the last kill: the run goes on to its end
        steps = checked(run_dir, expected)
        print(f"{len(killed)} kills, step {steps}: {killed[-1]}", flush=True)
    code, words = finished(tmp_path, "train", "--continue", run)
    assert code == 0, (seed, killed, words)
    assert checked(run_dir, expected) == STEPS
    assert last_sums(run_dir) == last_sums(base)
    assert RunFolder.open(run_dir).rollout_steps() == list(range(1, STEPS + 1))
    event = newest_event(run_dir)
    assert event is not None
    assert (event.step, event.what) == (STEPS, "save")
    by = [dict(sorted(Counter(kinds).items())) for kinds in zip(*killed, strict=True)]
    print(f"{len(killed)} kills in {lives} lives, seed {seed}: {by[0]}, in {by[1]}")
    assert len(killed) == KILLS
