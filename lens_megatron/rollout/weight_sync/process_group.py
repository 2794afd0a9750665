"""A process group of one trainer rank (rank 0 of it) and all ranks of the servers, built the way SGLang builds its end.

Not with init_process_group: that is the trainer's own. Rendezvous -> PrefixStore(name) -> the backend's helper.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

T = TypeVar("T")
# The sync gives up before the backend does. gloo keeps whoever breaks the group up waiting until a broadcast that nobody
# answers is over; NCCL waits so long for its own abort.
_MARGIN_S = {"nccl": 30.0, "gloo": 1.0}
_NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"


class Stopped(Exception):
    """The others gave up."""


class GroupWithServers:
    """Opens a store at once; `join` waits for the servers, which must be told `port` and `name`."""

    def __init__(self, name: str, size: int, backend: str, timeout_s: float) -> None:
        self.name, self.size, self._backend = name, size, backend
        self._limit_s = timeout_s
        # without waiting for workers, and on a port that is free: the servers are told of it afterwards
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "0.0.0.0", 0, None, True, datetime.timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=False
        )
        self._group: Any = None
        self._connected = False

    @property
    def port(self) -> int:
        return int(self._store.port)

    def join(self, stopped: Callable[[], bool]) -> None:
        def meet() -> None:
            with _without_watchdog():
                self._group, _ = c10d._new_process_group_helper(
                    self.size,
                    0,
                    [],
                    c10d.Backend(self._backend),
                    c10d.PrefixStore(self.name, self._store),
                    group_name=self.name,  # type: ignore[arg-type]
                    timeout=datetime.timedelta(seconds=self._limit_s + _MARGIN_S[self._backend]),
                )
            c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.size)}

        self._within_limit(meet, "to join the group", stopped)

    def broadcast(self, buffer_B: Tensor, stopped: Callable[[], bool]) -> Any:
        """NCCL connects in the first one, which does not return before all servers take part, and knows no time limit."""
        stream = torch.cuda.current_stream(buffer_B.device) if buffer_B.is_cuda else None

        def begin() -> Any:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():  # a thread has its own
                return dist.broadcast(buffer_B, src=0, group=self._group, async_op=True)

        work = begin() if self._connected else self._within_limit(begin, "to connect", stopped)
        self._connected = True
        return work

    def wait(self, work: Any, stopped: Callable[[], bool]) -> None:
        """A refused update leaves a broadcast that nobody answers: it is given up when the others stop."""
        began = looked = time.monotonic()
        pause = 1e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
            if time.monotonic() - looked > 0.05:
                looked = time.monotonic()
                self._go_on(began, "to take a bucket", stopped)
        work.wait()

    def _within_limit(self, action: Callable[[], T], what: str, stopped: Callable[[], bool]) -> T:
        """In a thread, which is left behind if it does not return: what the others do is noticed meanwhile."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def act() -> None:
            try:
                outcome.append(action())
            except BaseException as error:  # handed to the caller's thread
                failure.append(error)

        thread = threading.Thread(target=act, daemon=True)
        began = time.monotonic()
        thread.start()
        while thread.is_alive():
            self._go_on(began, what, stopped)
            thread.join(0.02)
        if failure:
            raise failure[0]
        return outcome[0]

    def _go_on(self, began: float, what: str, stopped: Callable[[], bool]) -> None:
        if stopped():
            raise Stopped
        if time.monotonic() - began > self._limit_s:
            raise TimeoutError(f"waited {self._limit_s:g} s for the servers {what}")

    def abandon(self) -> None:
        """Without the servers: breaks the connections, which ends what they wait for as well."""
        group, self._group = self._group, None
        if group is not None:
            # some backends wait for the pending broadcast in here: until its time is up, in a thread of its own
            threading.Thread(target=_break_up, args=(group,), daemon=True).start()


@contextlib.contextmanager
def _without_watchdog() -> Iterator[None]:
    """Around the making of a group: its constructor alone reads this.

    torch watches every NCCL group in a thread that ends the process a minute after a broadcast has failed, though the sync
    has long gone on without the server that died. Without it `is_completed` still asks NCCL, and `wait` raises what it said.
    """
    before = os.environ.get(_NO_WATCHDOG)
    os.environ[_NO_WATCHDOG] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_WATCHDOG]
        else:
            os.environ[_NO_WATCHDOG] = before


def _break_up(group: Any) -> None:
    with contextlib.suppress(Exception):
        group.abort()
    with contextlib.suppress(Exception):
        dist.destroy_process_group(group)


def advice(error: Exception) -> str:
    """What NCCL's own words do not say."""
    if "invalid usage" not in str(error) and "ncclInvalidUsage" not in str(error):
        return ""
    version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "unknown"
    return (
        f"; NCCL refuses a peer of another version: the trainer's is {version}. Install the torch of the servers' environment "
        "here, or set rollout.sync.transport: disk"
    )
