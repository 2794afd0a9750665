"""Cells run one after another, or several at once: on this machine as processes, on Slurm as jobs, or only planned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import take_lock
from lens_megatron.run_folder import RunFolder
from lens_megatron.studies.config import Cell, Study
from lens_megatron.studies.planned import plan_of_cell
from lens_megatron.studies.states import CellState, check_same_cells, read_state, to_do, write_state

Tell = Callable[[str], None]
_POLL_S = 5.0
_HOPELESS_S = 60.0  # that Slurm says of a job that it can never start: partitions are reconfigured, too
_ONE_SUBMITS = threading.Lock()  # nemo-run keeps what it submits in globals


def run_study(study: Study, tell: Tell, only: Sequence[str] = ("*",)) -> None:
    """A cell that fails does not stop the others. `only`: patterns of names, for a study that is run in pieces."""
    wanted = {cell.name for cell in study.cells for pattern in only if fnmatchcase(cell.name, pattern)}
    if not wanted:
        raise UsageError(f"--only {' '.join(only)}: no cell has such a name; --list shows them")
    check_same_cells(study, [cell for cell in study.cells if cell.name in wanted])
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        (study.folder / "logs").mkdir(exist_ok=True)
        lock = (study.folder / "study.lock").open("w")
    except OSError as error:
        raise UsageError(f"study_dir {study.folder} cannot be written: {error.strerror}") from None
    with lock:
        if not take_lock(lock):
            raise UsageError(f"study_dir {study.folder} is in use by another running study")
        cells = [cell for cell in to_do(study) if cell.name in wanted]
        done = len(wanted) - len(cells)
        if done:
            tell(f"{done} of {len(wanted)} cells are done already")
        children = Children()
        count = iter(range(done + 1, len(wanted) + 1))

        def one(cell: Cell) -> None:
            if cell.where != "simulated" and not children.stopping.is_set():
                write_state(study, cell, CellState("begun", "", None, cell.overrides))
            state = _run(study, cell, children, tell)
            if children.stopping.is_set():
                return
            write_state(study, cell, state)
            words = state.reason or (f"{state.seconds:.0f} s" if state.seconds else "")
            tell(f"[{next(count)}/{len(wanted)}] {cell.name}: {state.state}{f' ({words})' if words else ''}")

        with ThreadPoolExecutor(study.config.at_once) as pool:
            try:
                for future in [pool.submit(one, cell) for cell in cells]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                children.stop()
                raise


class Children:
    """The processes under way, so that an interrupted study leaves none behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, command: list[str], output: Path) -> int:
        with output.open("ab") as file:
            with self._lock:
                if self.stopping.is_set():
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
            return code

    def stop(self) -> None:
        with self._lock:
            self.stopping.set()
            for process in self._processes:
                with suppress(ProcessLookupError):
                    process.terminate()


def _run(study: Study, cell: Cell, children: Children, tell: Tell) -> CellState:
    start = time.monotonic()
    try:
        if cell.where == "simulated":
            plan = plan_of_cell(study, cell)
            if not plan.fits:
                return CellState("failed", plan.complaint, None, cell.overrides)
            return CellState("simulated", "", None, cell.overrides)
        if cell.where == "slurm":
            reason = _on_slurm(study, cell, children, lambda line: tell(f"{cell.name}: {line}"))
        else:
            reason = _here(study, cell, children)
    except (UsageError, RunError) as error:
        reason = str(error)
    return CellState("failed" if reason else "done", reason, time.monotonic() - start, cell.overrides)


def _here(study: Study, cell: Cell, children: Children) -> str:
    """Why it failed; empty when it did not."""
    output = study.folder / "logs" / f"{cell.name}.txt"
    resume = ["--resume"] if RunFolder(cell.run_dir).holds_run() else []
    run_dir = f"run_dir={json.dumps(str(cell.run_dir))}"
    command = [sys.executable, "-m", "lens_megatron.cli", "train", *resume, str(study.run), *cell.overrides, run_dir]
    code = children.run(command, output)
    return "" if code == 0 else last_words(output, code)


def last_words(output: Path, code: int) -> str:
    """The line that says why, else the last one, else the exit code."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(("error:", "failed:")):
            return line
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}: {lines[-1]}" if lines else ended


def _on_slurm(study: Study, cell: Cell, children: Children, tell: Tell) -> str:
    """The job of an interrupted study is waited for, not submitted again, and taken for what it is if it has ended well.
    `tell` hears of warnings, of the job, and why it waits: every reason once."""
    from launchers import slurm
    from launchers.queue import Handle

    handle = Handle.of(cell.run_dir)
    now = handle.status() if handle is not None else None
    if handle is None or now is None or (now.over and now.state != "done"):
        resume = RunFolder(cell.run_dir).holds_run()
        overrides = [*cell.overrides, f"run_dir={json.dumps(str(cell.run_dir))}"]
        with _ONE_SUBMITS:
            handle = slurm.submit(study.run, overrides, study.site, cell.name, resume=resume, tell=_warnings(tell))
        now = handle.status()
        tell(f"submitted job {now.job}")
    elif not now.over:
        tell(f"job {now.job} of an earlier start goes on, {now.state}")
    since, told = time.monotonic(), {""}
    while not now.over:
        if now.reason not in told:
            tell(f"job {now.job} {now.state}: {now.reason}")
        told.add(now.reason)
        if children.stopping.wait(_POLL_S):  # jobs outlive an interrupted study
            break
        now = handle.status()
        if not now.never:
            since = time.monotonic()
        elif time.monotonic() - since > _HOPELESS_S:
            handle.cancel()  # else the cell, launched anew, would wait for it again
            return f"job {now.job} cancelled: {now.reason}"
    if now.state == "done":
        return ""
    return f"job {now.job} {now.state}{f': {now.reason}' if now.reason else ''}"


def _warnings(tell: Tell) -> Tell:
    """Of what `submit` says a job will be, which cells have in common."""
    return lambda line: tell(line) if line.startswith("warning: ") else None


def summary(study: Study) -> list[str]:
    """One line for each cell that failed."""
    states = [(cell, read_state(study, cell)) for cell in study.cells]
    return [f"{cell.name}: {state.reason}" for cell, state in states if state.state == "failed"]


def clean_environment() -> None:
    """A study inside torchrun or srun would start cells as ranks of it."""
    if "RANK" in os.environ:
        raise UsageError("study: started inside torchrun or srun; start it by itself, it starts its cells")
