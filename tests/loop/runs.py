"""Runs of the real command with a tiny random model that the toy task's tokenizer fits, and what is read off them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from lens_megatron.rollout_table import RolloutRow
from lens_megatron.run_folder import RunFolder

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
# What speculation cost, and how long things took: the rest is decided by the seed.
FREE_TO_DIFFER: tuple[str, ...] = (
    "time/",
    "sampling/speculated",
    "sampling/wasted",
    "sampling/saved",
    "sampling/seconds",
)
FREE_TO_DIFFER += ("sampling/originals_seconds", "sampling/resubmitted")
STEPS = 8  # of the run that others are compared with
PATIENCE_S = 240.0  # of a command on a busy machine; idle, it takes some ten seconds


def write_task(folder: Path, **model: Any) -> Path:
    """A model folder `model` with random weights and prompts `train.jsonl`. `model`: of its config.json."""
    from lens_megatron.data import toy
    from lens_megatron.mcore.hf_files import random_weights, write_hf_folder
    from lens_megatron.mcore.hf_names import hf_shapes
    from lens_megatron.model_spec import load_model_spec

    shape = folder / "shape"
    toy.write_tokenizer(shape)
    tiny = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 256}
    (shape / "config.json").write_text(json.dumps({**toy.model_config(), **tiny, **model}))
    weights = random_weights(hf_shapes(load_model_spec(shape)), seed=1, std=0.2)
    write_hf_folder(folder / "model", weights, companions_from=shape)
    toy.write_jsonl(folder / "train.jsonl", toy.prompt_rows(24, seed=0))
    return folder


def run_tree(task: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A lens run in which every step purifies something: rewards vary, ties are broken by position."""
    tree: dict[str, Any] = {
        "model": str(task / "model"),
        "run_dir": str(run_dir),
        "steps": 2,
        "algorithm": {"preset": "lens", "rescue": {"ties": "position", "gamma": 0.1}},
        "parallel": {"tp": 2},
        "data": {"train": str(task / "train.jsonl"), "prompts_per_step": 4},
        "rollout": {"n": 4, "max_response_tokens": 12, "schedule": "speculative", "slots": 12},
        "rewards": {"default": {"kind": "function", "function": "loop_rewards:by_hash"}, "workers": 1},
        "optimizer": {"lr": 1.0e-2},
        "checkpoint": {"every": 0},
        "timeout_s": 120.0,
    }
    return {**tree, **changes}


def write_run(folder: Path, tree: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "RUN.yaml"
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


@dataclass
class Command:
    """`lens-megatron ...` in a process group of its own, and every process that it was seen to start."""

    process: subprocess.Popen[bytes]
    output: Path
    family: set[psutil.Process] = field(default_factory=set)

    def look_around(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family.update(psutil.Process(self.process.pid).children(recursive=True))
        return [member for member in self.family if _lives(member)]

    def until(self, happened: Callable[[], Any], what: str) -> None:
        """Waits for something in the run folder, while the command lives."""
        deadline = time.monotonic() + PATIENCE_S
        looked = 0.0
        while not happened():
            assert self.process.poll() is None, f"ended before {what}: {self.words()}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s: {self.words()}"
            if time.monotonic() - looked > 0.2:
                self.look_around()
                looked = time.monotonic()
            time.sleep(0.001)
        self.look_around()

    def member(self, *words: str, **environment: str) -> psutil.Process:
        """The one process of the family with these words in its command line and these variables."""
        found = []
        for process in self.look_around():
            with contextlib.suppress(psutil.Error):
                line, variables = " ".join(process.cmdline()), process.environ()
                if all(word in line for word in words) and environment.items() <= variables.items():
                    found.append(process)
        assert len(found) == 1, f"{len(found)} processes with {words} {environment}"
        return found[0]

    def kill_all(self) -> None:
        """The whole process group at once, as a node does that goes away."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.nobody_left(10.0)

    def ends(self, seconds: float = PATIENCE_S) -> int:
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.look_around()
            assert time.monotonic() < deadline, f"still running after {seconds:.0f} s: {self.words()}"
            time.sleep(0.1)
        return self.process.returncode

    def nobody_left(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while left := [member for member in self.family if _lives(member)]:
            assert time.monotonic() < deadline, f"left behind: {[' '.join(one.cmdline())[:200] for one in left]}"
            time.sleep(0.05)

    def words(self) -> str:
        return self.output.read_text(errors="replace")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def started(folder: Path, *arguments: str, command: Sequence[str] | None = None) -> Iterator[Command]:
    """`lens-megatron ARGUMENTS`; nothing of it outlives the block."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"output-{time.monotonic_ns()}.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "lens_megatron.cli")), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = Command(process, output)
    try:
        yield running
    finally:
        running.look_around()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finished(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed; and nobody is left behind."""
    with started(folder, *arguments) as command:
        code = command.ends()
        command.nobody_left()
        return code, command.words()


def train(folder: Path, tree: Mapping[str, Any], *more: str) -> list[dict[str, Any]]:
    """The metrics of a run that must succeed."""
    code, words = finished(folder, "train", str(write_run(folder, tree)), *more)
    assert code == 0, words
    return metrics(Path(tree["run_dir"]))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def rollouts(run_dir: Path, step: int) -> list[RolloutRow]:
    return [RolloutRow(**row) for row in RunFolder.open(run_dir).read_rollout_columns(step)]


def as_of(base: Path, step: int, folder: Path) -> Path:
    """A copy of a finished run as it was left when `step` was the newest checkpoint, its later metrics still there."""
    shutil.copytree(base, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return folder


def decided(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of a step's metrics, what the seed alone decides."""
    return {name: value for name, value in tree.items() if not name.startswith(FREE_TO_DIFFER)}


def complaint(words: str) -> str:
    """The one line that says what is wrong; a traceback is no such line."""
    assert "Traceback" not in words, words
    lines = [line for line in words.splitlines() if line.startswith(("error:", "failed:"))]
    assert len(lines) == 1, words
    return lines[0]
