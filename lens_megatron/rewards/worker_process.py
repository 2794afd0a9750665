"""A reward worker as the pool sees it: a process, the channel to it, and what it is judging."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lens_megatron.rewards.judgement import Judgement

STDERR = 2


@dataclass(frozen=True)
class Request:
    id: str
    source: str
    answer: str
    response: str
    cut: bool = False


@dataclass
class Job:
    request: Request
    custom: bool
    future: Future[Judgement]
    key: bytes | None
    attempts: int = 0


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    custom: bool
    ready: bool = False
    job: Job | None = None
    buffer: bytearray = field(default_factory=bytearray)
    wall_start: float = field(default_factory=time.monotonic)
    cpu_start: float = 0.0
    look_at: float = 0.0  # when its clocks are next read

    def give(self, job: Job) -> bool:
        """False when it cannot take it any more."""
        self.job = job
        message = json.dumps({name: getattr(job.request, name) for name in ("source", "answer", "response", "cut")})
        try:
            self.channel.sendall(message.encode() + b"\n")
        except OSError:
            return False
        return True

    def messages(self) -> list[dict[str, Any]] | None:
        """What it has said by now; None when it is gone."""
        try:
            data = self.channel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        self.buffer += data
        found = []
        while (end := self.buffer.find(b"\n")) >= 0:
            found.append(json.loads(bytes(self.buffer[:end])))
            del self.buffer[: end + 1]
        return found

    def cpu(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return self.cpu_start
        return float(times.user + times.system)

    def kill(self) -> None:
        """With all that a reward function started in it. Only before `end`: its number may be another's afterwards."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone already
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Killed, if it has not ended itself; its exit code."""
        self.kill()
        self.channel.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait()


def environment(custom: bool) -> dict[str, str]:
    """One thread and no GPU each. The user's functions are found as the trainer finds them, from the working folder too;
    the shipped kinds are safe from what happens to lie there."""
    package = str(Path(__file__).resolve().parents[2])
    path = [package, *(entry for entry in sys.path if entry), *([str(Path.cwd())] if custom else [])]
    safe = {} if custom else {"PYTHONSAFEPATH": "1"}
    return {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **safe}


def started(custom: bool, settings: str) -> Worker:
    """`settings`: of rewards, as JSON. Its standard input is open for as long as this process lives."""
    ours, theirs = socket.socketpair()
    told = f'{{"fd": {theirs.fileno()}, "custom": {json.dumps(custom)}, "config": {settings}}}'
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "lens_megatron.rewards.worker", told],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment(custom)},
            stdin=subprocess.PIPE,
            stdout=STDERR,
            start_new_session=True,  # a group of its own, to be killed as one
        )
    ours.settimeout(10)
    return Worker(process, ours, custom)
