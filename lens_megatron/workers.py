"""The worker processes of one machine: started by the command itself when nobody (torchrun, srun) has started any.

Every worker runs the same command line. The first to fail ends the others; its own last words are what the user reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lens_megatron import stopping
from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import replace_text

_STARTED_BY = "LENS_MEGATRON_STARTED_BY"  # pid of the process that started this worker
MEETING = "LENS_MEGATRON_MEETING"  # file of a launched job where rank 0 writes its port
_MEETING_S = 600.0  # for rank 0 to be started and to import torch
_meeting_point: object = None  # rank 0's, open as long as it lives
_GRACE_S = 10.0
_SETTLE_S = 2.0
_BLOCKED_S = 2.0  # for a killed process to be gone, unless the kernel holds it
_LEAVING_S = 120.0  # for one that ended well: much memory, of a GPU or pinned, takes long to be given back
TERMINATED = 128 + signal.SIGTERM  # exit code of a worker that this process told to end
LOST_PEER = 75  # exit code of a worker that only met another one's end: it says nothing, the other knows why
_WELL = (0, *stopping.EXIT_CODES.values())
_SILENT = (LOST_PEER, TERMINATED, -signal.SIGTERM)


def is_worker() -> bool:
    """True inside torchrun, srun or a process started by `run_workers`."""
    _adopt_slurm()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _adopt_slurm() -> None:
    """Inside srun with several tasks: Slurm's names for ranks, as torch expects them."""
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if (
        tasks == 1
        or "RANK" in os.environ
        or "SLURM_PROCID" not in os.environ
        or "SLURM_STEP_NODELIST" not in os.environ
    ):
        return
    if "MASTER_ADDR" not in os.environ:
        names = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()[0]
    if (meeting := os.environ.get(MEETING)) is not None:
        port = _meet(Path(meeting), os.environ["MASTER_ADDR"], int(os.environ["SLURM_PROCID"]))
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    # without a launcher: one port a job, the same on all its nodes
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"),
    )
    if (tasks_of_nodes := os.environ.get("SLURM_STEP_TASKS_PER_NODE")) is not None:
        # servers that the run starts itself come after the trainer's GPUs: it must be known how many those are
        node = int(os.environ.get("SLURM_NODEID", "0"))
        os.environ["LOCAL_WORLD_SIZE"] = str(_tasks_of_each(tasks_of_nodes)[node])


def _tasks_of_each(nodes: str) -> list[int]:
    """Slurm's "8(x2),4" -> [8, 8, 4]."""
    counts = []
    for part in nodes.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def _meet(place: Path, address: str, rank: int) -> int:
    """The port where the ranks meet. Rank 0 opens it, whichever is free, and writes it down in a file that all see."""
    global _meeting_point
    if rank == 0:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = _meeting_point = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        replace_text(place, str(store.port))
        return store.port
    deadline = time.monotonic() + _MEETING_S
    while place not in place.parent.iterdir():  # a listing: NFS remembers for long that a file is not there
        if time.monotonic() > deadline:
            raise RunError(f"rank {rank}: rank 0 did not say within {_MEETING_S:.0f} s where to meet ({place})")
        time.sleep(0.1)
    return int(place.read_text())


def is_local_worker() -> bool:
    """True in a process started by `run_workers`, whose command does the talking."""
    return _STARTED_BY in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def run_workers(processes: int, command: Sequence[str]) -> int:
    """Run `lens-megatron COMMAND` in `processes` workers; the exit code of the first that failed, or 0."""
    import torch
    from rich.console import Console
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f"parallel: the layout needs {processes} processes, this machine has {torch.cuda.device_count()} GPUs; "
            "start it with torchrun or srun over several nodes, or change parallel"
        )
    # This process holds the meeting point: no port has to be guessed, and none can be taken by another run.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="lens-megatron-") as folder:
        errors = [Path(folder) / f"rank{number}.err" for number in range(processes)]
        workers = [_start(number, processes, store.port, command, errors[number]) for number in range(processes)]
        held = _Held(workers)
        try:
            return _wait(workers, errors, held)
        except BaseException:
            _end(workers, held)
            raise
        finally:  # a rank 0 that was killed left a terminal without one
            Console(stderr=True).show_cursor(True)


def end_with_starter() -> None:
    """In a worker: die when the process that started it does, even if that is killed (Linux)."""
    starter = os.environ.get(_STARTED_BY)
    if starter is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(starter):
        raise RunError("the process that started this worker has gone")


def _start(number: int, processes: int, port: int, command: Sequence[str], errors: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 joins the store too, instead of opening one
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
        _STARTED_BY: str(os.getpid()),
    }
    # rank 0 speaks to the user; the others' errors are kept, and read out if they fail
    with errors.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lens_megatron.cli", *command],
            env=environment,
            stdout=None if number == 0 else subprocess.DEVNULL,
            stderr=None if number == 0 else file,
        )


class _Held:
    """Workers that have ended, or are to be killed, while a system call of theirs does not return: a file system does not
    answer. Everyone who ends looks like that for a moment, and a process with much memory for longer."""

    def __init__(self, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        self._workers = workers
        self._since = [float("inf")] * len(workers)

    def look(self) -> set[int]:
        now = time.monotonic()
        for number, worker in enumerate(self._workers):
            held = worker.poll() is None and _is_dying(worker.pid)
            self._since[number] = min(self._since[number], now) if held else float("inf")
        return {
            number
            for number, since in enumerate(self._since)
            if now - since > _BLOCKED_S
            and (now - since > _LEAVING_S or _code_before_it_is_gone(self._workers[number].pid) not in _WELL)
        }


def _is_dying(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # gone; or not Linux
        return False
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"].split()[0] == "Z" or bool(pending >> (signal.SIGKILL - 1) & 1)


def _code_before_it_is_gone(pid: int) -> int | None:
    """The exit code of a process whose first thread has ended while another is still being cleared away."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[-1])
    return os.waitstatus_to_exitcode(status) if fields[0] == "Z" else None


def _wait(workers: Sequence[subprocess.Popen[bytes]], errors: Sequence[Path], held: _Held) -> int:
    while True:
        stopping.pass_on(workers[0].pid)
        stuck = held.look()
        codes = [
            _code_before_it_is_gone(worker.pid) if number in stuck else worker.poll()
            for number, worker in enumerate(workers)
        ]
        if all(code in _WELL for code in codes):
            for number in stuck:
                _say_it_is_left(number, workers[number])
            return codes[0] or 0
        if any(
            code not in _WELL if number in stuck else code not in (None, *_WELL) for number, code in enumerate(codes)
        ):
            return _report(workers, errors, held)
        time.sleep(0.05)


def _say_it_is_left(number: int, worker: subprocess.Popen[bytes]) -> None:
    print(f"rank {number} (process {worker.pid}) ends when its file system answers again", file=sys.stderr)


def _report(workers: Sequence[subprocess.Popen[bytes]], errors: Sequence[Path], held: _Held) -> int:
    """The words and the exit code of the worker that knows why."""
    began = time.monotonic()
    while _running(workers, held):
        number = _first_to_know(workers)
        # rank 0 may be about to report the same error in its own words; or only others' ends were met so far
        patience_s = _GRACE_S if number is None else 0.0 if workers[0].poll() is not None else _SETTLE_S
        if time.monotonic() - began > patience_s:
            break
        time.sleep(0.02)
    number = _first_to_know(workers)
    stuck = _end(workers, held)  # before anything is said: rank 0 may be closing, and say it at the end of that
    code = workers[0].returncode
    if number == 0 or (code is not None and code > 0 and code not in _SILENT):  # below 0 it was ended just now
        return _exit_code(0, workers[0])
    if number is None:  # one that the kernel holds has no exit code, and may have left its words
        number = next((n for n, worker in enumerate(workers) if worker.poll() is None and _spoke(errors[n])), None)
    if number is None and code is None:
        if 0 not in stuck:  # else it has said why
            print(
                "failed: rank 0 is in a system call that does not return: a file system does not answer",
                file=sys.stderr,
            )
        return 1
    if number is None:
        print("failed: the workers lost each other; the network or the machine may be at fault", file=sys.stderr)
        return 1
    words = errors[number].read_text(errors="replace").strip().splitlines()
    if words:
        print("\n".join(words[-20:]), file=sys.stderr)
    elif (workers[number].returncode or 0) > 0:
        print(f"failed: rank {number} ended without a word", file=sys.stderr)
    return _exit_code(number, workers[number])


def _spoke(errors: Path) -> bool:
    return any(line.startswith(("error:", "failed:")) for line in errors.read_text(errors="replace").splitlines())


def _first_to_know(workers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((n for n, worker in enumerate(workers) if worker.poll() and worker.returncode not in _SILENT), None)


def _exit_code(number: int, worker: subprocess.Popen[bytes]) -> int:
    code = worker.returncode
    if code is None:
        return 1
    if code < 0:
        print(f"failed: rank {number} ended without a word, by {signal.Signals(-code).name}", file=sys.stderr)
        return 1
    return code


def _running(workers: Sequence[subprocess.Popen[bytes]], held: _Held) -> list[subprocess.Popen[bytes]]:
    stuck = held.look()
    return [worker for number, worker in enumerate(workers) if number not in stuck and worker.poll() is None]


def _end(workers: Sequence[subprocess.Popen[bytes]], held: _Held) -> set[int]:
    """By force where it must be. Those that the kernel holds, of which one says why."""
    for worker in _running(workers, held):
        worker.terminate()
    deadline = time.monotonic() + _GRACE_S
    # a stopped process hears nothing but SIGKILL
    while time.monotonic() < deadline and any(not _is_stopped(worker.pid) for worker in _running(workers, held)):
        time.sleep(0.05)
    stuck = held.look()
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    deadline = time.monotonic() + _BLOCKED_S
    for number, worker in enumerate(workers):
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=0.0 if number in stuck else max(0.0, deadline - time.monotonic()))
            continue
        _say_it_is_left(number, worker)
    return stuck


def _is_stopped(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED,)
    except psutil.Error:
        return False
