"""How a training process ends when it is told to, or when a process that it works with goes away.

The command that the user started speaks; the workers that it started end without a word, so that the user reads one
reason and not one a process.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from lens_megatron import workers
from lens_megatron.errors import RunError, Terminated
from lens_megatron.run_folder import Ending, RunFolder

RESUME = "go on with --resume from the last whole checkpoint"
AGAIN = "run it again to go on"  # of commands that find by themselves what is done
AFRESH = "start it again"  # of commands that keep nothing
_WAITED_FOR_ASIDE_S, _ASIDE_S = 1.0, 10
_NO_RUN = 3  # exit code of `tell_run`
_what_then = ""  # of the command that runs
_run_dir: str | None = None  # of one that can be resumed


def on_signals(what_then: str = AGAIN) -> None:
    """SIGTERM (a scheduler, `stop`) unwinds like an error, so that drivers and files are closed; `what_then` says how to go
    on. Ctrl-C, which a terminal sends to every process, is left to the command that started the workers."""
    global _what_then, _run_dir
    _what_then, _run_dir = what_then, None
    if workers.is_local_worker():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminated)


def resumes_in(run_dir: str) -> None:
    """Where the run is of a command that advises to resume: it does so only if there is one by then."""
    global _run_dir
    _run_dir = run_dir


def advice() -> str:
    """How to go on, for a command that is ended now; empty if it says nothing."""
    if _what_then == RESUME and (_run_dir is None or _aside(tell_run, _run_dir) == _NO_RUN):
        return AFRESH
    return _what_then


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: closing must not be cut short
    if workers.is_local_worker():
        raise SystemExit(workers.TERMINATED)
    raise Terminated(f"ended by SIGTERM; {advice()}")


@contextlib.contextmanager
def noted(folder: RunFolder | None) -> Iterator[None]:
    """What broke a run that had begun is left in its folder. `folder`: rank 0's."""
    try:
        yield
    except KeyboardInterrupt:
        _note(folder, "unfinished", "interrupted")
        raise
    except (Exception, Terminated) as error:
        _note(folder, "failed", " ".join(str(error).split()) or type(error).__name__)
        raise


def noted_workers(run_dir: str, run: Callable[[], int]) -> int:
    """`run` in the command that starts the workers: of its ends, those that rank 0 was not left time to note are noted."""
    try:
        code = run()
    except KeyboardInterrupt:
        _aside(note_silent_end, run_dir, "unfinished", "interrupted")
        raise
    except Terminated as error:
        _aside(note_silent_end, run_dir, "failed", str(error))
        raise
    if code == 1:
        why = "one of its processes failed: see what it printed where it was started, and logs/"
        _aside(note_silent_end, run_dir, "failed", why)
    return code


def _aside(call: Callable[..., object], *arguments: str) -> int | None:
    """By a process of its own: if what ended the workers is a file system that does not answer, nobody would ever be rid of
    this one. Its exit code, unless it takes longer than one waits."""
    # whenever the kernel lets go of it, it dies of the alarm before it writes: by then the run may go on again
    code_of_it = (
        f"import signal, sys; signal.alarm({_ASIDE_S}); "
        f"from {__name__} import {call.__name__}; sys.exit({call.__name__}(*sys.argv[1:]))"
    )
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", code_of_it, *arguments],
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(_WAITED_FOR_ASIDE_S)
    return None


def tell_run(run_dir: str) -> int:
    return 0 if RunFolder(run_dir).holds_run() else _NO_RUN


def note_silent_end(run_dir: str, state: Ending, reason: str) -> None:
    folder = RunFolder(run_dir)
    if folder.holds_run() and folder.read_ending() is None:
        _note(folder, state, reason)


def _note(folder: RunFolder | None, state: Ending, reason: str) -> None:
    if folder is not None and folder.holds_run():
        with contextlib.suppress(RunError):  # a full disk: the reason that is under way is the one to hear
            folder.write_ending(state, reason)


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
    """torch reports a process that went away during a collective in every other one, each with a traceback."""
    try:
        yield
    except RuntimeError as error:
        # here, for it brings torch, which what starts the workers does without
        from lens_megatron.mcore.agreement import is_of_transport

        if not is_of_transport(error):
            raise
        if workers.is_local_worker():
            sys.exit(workers.LOST_PEER)
        first_line = str(error).splitlines()[0]
        raise RunError(f"rank {workers.rank()}: another process of the run went away ({first_line})") from error
