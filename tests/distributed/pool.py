"""Worker processes joined over gloo, started once per world size and shared by all tests: imports cost more than tests.

A case is a function run on every rank; the pool returns every rank's result in rank order. A case that raises or outlives
its time kills the pool, so that a broken process group never meets the next test.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

# Megatron-Core's gradient buffers keep themselves, and so their process groups, alive through hooks on autograd's nodes. A run
# has one model and never notices; here hundreds would pile up, each with threads of gloo, so the pool starts afresh.
_MOST_THREADS = 250


class CaseFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class WorkerPool:
    def __init__(self, world_size: int, collective_s: float = 600.0) -> None:
        """`collective_s`: how long a rank waits in one."""
        self.world_size, self._collective_s = world_size, collective_s
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, case: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0, **keywords: Any) -> list[Any]:
        if not self._workers:
            self._start()
        self._signal(signal.SIGCONT)
        for _, connection in self._workers:
            connection.send((case, arguments, keywords))
        results: dict[int, Any] = {}
        threads = 0
        deadline = time.monotonic() + timeout_s
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"{case.__name__}: ranks {sorted(waiting.values())} gave no answer in {timeout_s:.0f} s")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type,call-overload]
                try:
                    good, value, count = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._fail(f"{case.__name__}: rank {rank} died")
                if not good:
                    self._fail(f"{case.__name__} on rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
                threads = max(threads, count)
        self._signal(signal.SIGSTOP)
        if threads > _MOST_THREADS:
            self.close()
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _signal(self, number: signal.Signals) -> None:
        """Between cases processes are stopped: each thread of gloo looks around a hundred times a second."""
        for process, _ in self._workers:
            assert process.pid is not None
            os.kill(process.pid, number)

    def _fail(self, message: str) -> None:
        self.close()
        raise CaseFailed(message)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # a TCP store like a run's own: a file store's waits end otherwise
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, self._collective_s, self._store.port, there), daemon=True
            )
            process.start()
            there.close()
            self._workers.append((process, here))


def _serve(rank: int, world_size: int, collective_s: float, port: int, connection: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", PYTHONWARNINGS="ignore")
    import ctypes
    import warnings

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a stopped process hears nothing else of the end of the tests
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)  # type: ignore[attr-defined]
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(world_size)])  # joining takes less than a short `collective_s`
    limit = timedelta(seconds=collective_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    while True:
        try:
            case, arguments, keywords = connection.recv()
        except EOFError:
            break
        try:
            answer = (True, case(*arguments, **keywords))
        except BaseException:  # reported to the test, whatever it was
            answer = (False, traceback.format_exc())
        connection.send((*answer, len(list(Path("/proc/self/task").iterdir()))))
