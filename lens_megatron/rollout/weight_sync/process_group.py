"""A process group of one trainer rank (rank 0 of it) and all ranks of the servers, built the way SGLang builds its end.

Not with init_process_group: that is the trainer's own. Rendezvous -> PrefixStore(name) -> the backend's helper.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Stopped(Exception):
    """The others gave up."""


class GroupWithServers:
    """Opens a store at once; `join` waits for the servers, which must be told `address`, `port` and `name`."""

    def __init__(self, name: str, size: int, address: str, backend: str, timeout_s: float) -> None:
        self.name, self.size, self.address, self._backend = name, size, address, backend
        self._timeout = datetime.timedelta(seconds=timeout_s)
        # without waiting for workers, and on a port that is free: the servers are told of it afterwards
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "0.0.0.0", 0, None, True, self._timeout, wait_for_workers=False, multi_tenant=False
        )
        self._group: Any = None

    @property
    def port(self) -> int:
        return int(self._store.port)

    def join(self, stopped: Callable[[], bool]) -> None:
        """In a thread, so that a server's refusal is noticed meanwhile."""
        outcome: list[BaseException] = []

        def meet() -> None:
            try:
                self._group, _ = c10d._new_process_group_helper(
                    self.size,
                    0,
                    [],
                    c10d.Backend(self._backend),
                    c10d.PrefixStore(self.name, self._store),
                    group_name=self.name,  # type: ignore[arg-type]
                    timeout=self._timeout,
                )
                c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.size)}
            except BaseException as error:  # handed to the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=meet, daemon=True)
        thread.start()
        while thread.is_alive():
            if stopped():
                raise Stopped
            thread.join(0.02)
        if outcome:
            raise outcome[0]

    def broadcast(self, buffer_B: Any) -> Any:
        return dist.broadcast(buffer_B, src=0, group=self._group, async_op=True)

    def wait(self, work: Any, stopped: Callable[[], bool]) -> None:
        """A refused update leaves a broadcast that nobody answers: it is given up when the others stop."""
        looked = time.monotonic()
        pause = 1e-5
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
            if time.monotonic() - looked > 0.05:
                looked = time.monotonic()
                if stopped():
                    raise Stopped
        work.wait()

    def abandon(self) -> None:
        """Without the servers: breaks the connections, which ends what they wait for as well."""
        group, self._group = self._group, None
        if group is not None:
            # some backends wait for the pending broadcast in here: until its time is up, in a thread of its own
            threading.Thread(target=_break_up, args=(group,), daemon=True).start()


def _break_up(group: Any) -> None:
    with contextlib.suppress(Exception):
        group.abort()
    with contextlib.suppress(Exception):
        dist.destroy_process_group(group)


def address_towards(url: str) -> str:
    """This machine's address as the server at `url` can reach it."""
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    if host in LOOPBACK:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, parts.port or 80))  # sends nothing: only picks the route
        return str(probe.getsockname()[0])
