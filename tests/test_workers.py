"""Local workers: their exit codes and last words, and that none outlives the others or its starter.

The workers here are a small script in place of `python -m lens_megatron.cli`, so that they start in no time.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import workers
from lens_megatron.errors import RunError, UsageError

# argv: -m lens_megatron.cli BEHAVIOUR_OF_RANK_0 BEHAVIOUR_OF_RANK_1 ...; each is a line of Python
WORKER = """
import os, signal, sys, time
from pathlib import Path
from lens_megatron import workers
assert sys.argv[1:3] == ["-m", "lens_megatron.cli"]
workers.end_with_starter()
rank = int(os.environ["RANK"])
note = Path({folder!r}) / f"pid{{rank}}.tmp"
note.write_text(str(os.getpid()))
note.rename(note.with_suffix(""))
exec(sys.argv[3 + rank])
"""
FOREVER = "time.sleep(600)"
AFTER_THE_OTHERS = "\n".join(  # once every other worker runs
    ["while len([p for p in Path({folder!r}).glob('pid*') if not p.suffix]) < {count}: time.sleep(0.01)", "{then}"]
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """What stands in for the interpreter that workers are started with."""
    (tmp_path / "worker.py").write_text(WORKER.format(folder=str(tmp_path)))
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/worker.py" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def run(script: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(workers.sys, "executable", str(script))
    return lambda *behaviours: workers.run_workers(len(behaviours), behaviours)


def once_all_run(folder: Path, count: int, then: str) -> str:
    return AFTER_THE_OTHERS.format(folder=str(folder), count=count, then=then)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid*")) if not path.suffix]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_all_well(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('rank 0 speaks')", "print('rank 1 is not heard'); print('nor here', file=sys.stderr)") == 0
    output = capfd.readouterr()
    assert output.out == "rank 0 speaks\n"
    assert output.err == ""


def test_what_a_worker_is_told(run: Any, tmp_path: Path) -> None:
    note = f"import json; Path({str(tmp_path)!r}, f'env{{rank}}').write_text(json.dumps(dict(os.environ)))"
    assert run(note, note, note) == 0
    for rank in range(3):
        told = json.loads((tmp_path / f"env{rank}").read_text())
        assert [told[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
            str(rank),
            str(rank),
            "3",
            "3",
        ]
        assert told["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(told["MASTER_PORT"]) < 65536
        assert int(told["OMP_NUM_THREADS"]) >= 1


def test_a_killed_rank_0_leaves_the_terminal_a_cursor(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress bar hides it."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w") as terminal:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run("os.kill(os.getpid(), 9)") == 1
        assert b"\x1b[?25h" in os.read(ours, 10_000)
    os.close(ours)


def test_a_failing_ranks_words_and_code_are_the_users(
    run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "print('error: experts: no such thing', file=sys.stderr); sys.exit(2)"
    started = time.monotonic()
    assert run(FOREVER, once_all_run(tmp_path, 3, fails), FOREVER) == 2
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == "error: experts: no such thing\n"
    assert len(pids(tmp_path)) == 3
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_rank_0_speaks_for_an_error_that_all_meet(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    fails = "time.sleep(0.3 if rank == 0 else 0); print(f'error: seen by {rank}', file=sys.stderr); sys.exit(2)"
    assert run(fails, fails, fails) == 2
    assert capfd.readouterr().err == "error: seen by 0\n"


def test_who_knows_why_may_be_slow_to_say_so(
    run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SETTLE_S", 0.1)
    says = "time.sleep(1.0); print('failed: rank 0 did not finish', file=sys.stderr); sys.exit(1)"
    assert run(says, once_all_run(tmp_path, 2, "sys.exit(workers.LOST_PEER)")) == 1
    assert capfd.readouterr().err == "failed: rank 0 did not finish\n"


def test_only_the_last_words_of_a_long_story(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    story = "[print('line', n, file=sys.stderr) for n in range(500)]; sys.exit(1)"
    assert run("", story) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "line 499"
    assert len(lines) == 20


def test_a_killed_worker_ends_the_others(run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    assert run(FOREVER, once_all_run(tmp_path, 3, killed), FOREVER) == 1
    words = capfd.readouterr().err
    assert "rank 1 ended without a word" in words
    assert "SIGKILL" in words
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_rank_0_killed(run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(once_all_run(tmp_path, 2, "os.kill(os.getpid(), signal.SIGKILL)"), FOREVER) == 1
    assert "SIGKILL" in capfd.readouterr().err
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_worker_deaf_to_sigterm_is_killed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_GRACE_S", 0.3)
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); Path({str(tmp_path)!r}, 'deaf').touch(); {FOREVER}"
    wait = f"while not Path({str(tmp_path)!r}, 'deaf').exists(): time.sleep(0.01)\nsys.exit(1)"
    assert run(wait, deaf) == 1
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_starter(script: Path, tmp_path: Path, how: signal.Signals) -> None:
    starter = f"""
        import sys
        from lens_megatron import workers
        workers.sys.executable = {str(script)!r}
        workers.run_workers(2, [{FOREVER!r}] * 2)
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(starter)], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(pids(tmp_path)) == 2)
        assert all(alive(pid) for pid in pids(tmp_path))
        process.send_signal(how)
        process.wait(timeout=30)
        wait_for(lambda: not any(alive(pid) for pid in pids(tmp_path)), seconds=20)
    finally:
        process.kill()
        process.wait()


def test_a_worker_whose_starter_is_gone_already_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from lens_megatron import workers; workers.end_with_starter(); print('began')"
    environment = {**os.environ, "LENS_MEGATRON_STARTED_BY": "1" if os.getpid() != 1 else "2"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "began" not in result.stdout
    assert RunError.__name__ in result.stderr


def test_who_is_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LENS_MEGATRON_STARTED_BY"):
        monkeypatch.delenv(name, raising=False)
    assert not workers.is_worker()
    assert workers.rank() == 0
    workers.end_with_starter()  # nobody's worker: nothing happens
    monkeypatch.setenv("RANK", "3")
    assert not workers.is_worker(), "a stray RANK alone says nothing"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert workers.is_worker()
    assert workers.rank() == 3


def test_more_processes_than_gpus_is_refused_before_any_starts(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="needs 2 processes, this machine has 1 GPUs"):
        run("", "")
    assert not pids(tmp_path)


def test_ranks_are_slurms_inside_srun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho node7\necho node8\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # restored after the test, whatever is set in it
        monkeypatch.delenv(name)
    slurm = {"PROCID": "3", "NTASKS": "4", "LOCALID": "1", "STEP_NODELIST": "node[7-8]", "JOB_ID": "41"}
    slurm |= {"STEP_TASKS_PER_NODE": "1(x1),3", "NODEID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert workers.is_worker()
    assert [os.environ[name] for name in names] == ["3", "4", "1", "3", "node7", "20041"]


def test_a_single_slurm_task_starts_its_own_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not workers.is_worker()


# the first thread is gone, with the exit code, while another takes its time: a process with much memory ends like this
SLOW_TO_GO = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=({seconds},)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_finished_worker_may_take_its_time_to_be_gone(
    run: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_BLOCKED_S", 0.1)
    slow = f"exec({SLOW_TO_GO.format(seconds=1.5)!r})"
    assert run(slow, "", slow) == 0
    assert capfd.readouterr().err == ""


def test_a_finished_worker_that_the_kernel_keeps_is_left_to_it(
    run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_BLOCKED_S", 0.1)
    monkeypatch.setattr(workers, "_LEAVING_S", 0.3)
    began = time.monotonic()
    assert run("", f"exec({SLOW_TO_GO.format(seconds=60)!r})") == 0
    assert time.monotonic() - began < 30
    assert "rank 1 (process " in capfd.readouterr().err
    os.kill(pids(tmp_path)[1], signal.SIGKILL)


def test_who_is_held_by_the_kernel_is_told_from_who_is_just_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zombie that nobody reaps looks like a process whose threads sit in a file system."""
    monkeypatch.setattr(workers, "_BLOCKED_S", 0.2)
    ended, lives = subprocess.Popen(["false"]), subprocess.Popen(["sleep", "600"])
    wait_for(lambda: not alive(ended.pid))

    class Unreaped:
        pid = ended.pid

        def poll(self) -> None:
            return None

    held = workers._Held([Unreaped(), lives])  # type: ignore[list-item]
    assert held.look() == set()
    time.sleep(0.3)
    assert held.look() == {0}
    lives.kill()
    ended.wait()
    lives.wait()
    assert held.look() == set(), "gone"


def test_a_worker_that_is_aborted_says_where_it_stood() -> None:
    """As NCCL ends one that waits for too long."""
    code = """
import os
from lens_megatron.commands._workers import in_layout
from lens_megatron.mcore.layout import ParallelConfig
def waits(): os.abort()
in_layout([], ParallelConfig(), None, waits)
"""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert "Aborted" in done.stderr and "in waits" in done.stderr
