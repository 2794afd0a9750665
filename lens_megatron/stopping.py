"""Told to end early: the run finishes its step, writes a checkpoint, and ends with an exit code of its own.

SIGUSR1 is how a scheduler announces that time is nearly up; the file `stop` in the run folder is how a user asks. Rank 0
hears either at a step's end, and all ranks leave after the same step.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

from lens_megatron.errors import UsageError

Order = Literal["make room", "stop"]
# of `train`: 85 asks the batch script to queue the job again, 86 says that nobody should
EXIT_CODES: dict[Order, int] = {"make room": 85, "stop": 86}
# a file that a launched job makes of the signal, also of one that comes too early for us
NOTICE = "LENS_MEGATRON_NOTICE"
_SIGNAL = signal.SIGUSR1


def hold_signal() -> None:
    """Keep SIGUSR1 for `order` to find, here and in every process that this one starts.

    Slurm sends it to all processes of a step: rollout driver, reward workers and servers must not die of it. A blocked
    signal stays blocked over exec, where a handler would be forgotten. First thing in a command: threads inherit it too.
    """
    signal.signal(_SIGNAL, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})


def pass_on(process_id: int) -> None:
    """From the process that started the workers to the one that looks for orders."""
    if _SIGNAL in signal.sigpending():
        signal.sigwait({_SIGNAL})
        os.kill(process_id, _SIGNAL)


def order(run_dir: Path) -> Order | None:
    """What this process was told, if anything."""
    if stop_file(run_dir).exists():
        return "stop"
    noticed = NOTICE in os.environ and Path(os.environ[NOTICE]).exists()
    return "make room" if noticed or _SIGNAL in signal.sigpending() else None


def stop_file(run_dir: Path) -> Path:
    return run_dir / "stop"


def ask_to_stop(run_dir: Path) -> None:
    try:
        stop_file(run_dir).touch()
    except OSError as error:
        raise UsageError(f"{stop_file(run_dir)}: {error.strerror}") from None


def forget_stop(run_dir: Path) -> None:
    """Who starts or resumes a run does not mean an earlier stop."""
    stop_file(run_dir).unlink(missing_ok=True)
