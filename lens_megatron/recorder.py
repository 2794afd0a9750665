"""A flight recorder: what this process did last, in a small file that survives being killed.

run_dir/logs/recorder/rank_00000.txt is a ring of lines of one length, each written over the oldest by one system call.
Not through memory: a page that cannot be written holds the memory of the whole process, and with it the thread that would
tell of a file system that does not answer. `read` puts the lines in order; so does `sort`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import IO, NamedTuple

_LINE = 64
_LINES = 128  # some 10 steps


class Event(NamedTuple):
    number: int
    clock: float  # of the wall, for people: durations are measured by the monotonic one
    step: int
    what: str
    seconds: float | None  # None: begun


class Recorder:
    def __init__(self, logs: Path, rank: int) -> None:
        self._file: IO[bytes] | None = None
        with contextlib.suppress(OSError):  # no room for it: the run's own files will say so
            path = path_of(logs, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            events = read(path) if path.exists() else []
            self._number = events[-1].number + 1 if events else 0
            if not path.exists() or path.stat().st_size != _LINE * _LINES:
                empty = b"".join(_line("") for _ in range(_LINES))
                path.write_bytes(empty)  # whole now: the disk may be full later
            self._file = path.open("r+b", buffering=0)

    def record(self, step: int, what: str, seconds: float | None = None) -> None:
        if self._file is None:
            return
        took = "begins" if seconds is None else f"{seconds:.6f}"
        text = f"{self._number:012} {time.time():.3f} {step} {took} {what}"
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), _line(text), self._number % _LINES * _LINE)
        self._number += 1


def path_of(logs: Path, rank: int) -> Path:
    return logs / "recorder" / f"rank_{rank:05}.txt"


def _line(text: str) -> bytes:
    return text.encode("ascii", "replace")[: _LINE - 1].ljust(_LINE - 1) + b"\n"


def read(path: Path) -> list[Event]:
    """Oldest first; a line that was being written when its process was killed is left out."""
    events = []
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        parts = line.split(maxsplit=4)
        try:
            number, clock, step, took, what = parts
            events.append(
                Event(int(number), float(clock), int(step), what.strip(), None if took == "begins" else float(took))
            )
        except ValueError:
            continue
    return sorted(events)
