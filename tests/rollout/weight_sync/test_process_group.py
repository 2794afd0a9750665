"""The trainer's end of a group with servers, over gloo; NCCL's habit of connecting in the first broadcast is put on."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from lens_megatron.rollout.weight_sync.process_group import GroupWithServers, Stopped

LIMIT_S = 2.0


def never() -> bool:
    return False


def join_as_server(group: GroupWithServers, limit_s: float = 5.0) -> Any:
    limit = datetime.timedelta(seconds=limit_s)
    store = dist.TCPStore("127.0.0.1", group.port, None, False, limit)  # type: ignore[attr-defined]
    for prefix in (group.name, f"{group.name}/", "cpu/"):  # as torch nests them
        store = c10d.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, 1, 2, limit)  # type: ignore[attr-defined]


@pytest.fixture
def joined() -> Iterator[tuple[GroupWithServers, Any]]:
    group = GroupWithServers(f"test-{time.monotonic_ns()}", 2, "gloo", LIMIT_S)
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(join_as_server, group)
        group.join(never)
    yield group, server.result()
    group.abandon()


def test_buckets_arrive(joined: tuple[GroupWithServers, Any]) -> None:
    group, server = joined
    for number in range(3):
        got_B = torch.zeros(64, dtype=torch.uint8)
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(lambda got_B=got_B: server.broadcast([got_B], dist.BroadcastOptions()).wait())  # type: ignore[attr-defined]
            group.wait(group.broadcast(torch.full((64,), number + 1, dtype=torch.uint8), never), never)
            taken.result()
        assert (got_B == number + 1).all()


def test_nobody_comes_to_the_meeting() -> None:
    group = GroupWithServers("alone", 2, "gloo", LIMIT_S)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="waited 2 s for the servers to join the group"):
        group.join(never)
    assert time.monotonic() - began < LIMIT_S + 3


def test_a_bucket_that_a_server_never_takes(joined: tuple[GroupWithServers, Any]) -> None:
    group, _ = joined
    work = group.broadcast(torch.zeros(2**24, dtype=torch.uint8), never)  # more than a socket holds
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="waited 2 s for the servers to take a bucket"):
        group.wait(work, never)
    assert time.monotonic() - began < LIMIT_S + 3


@pytest.mark.parametrize("others_stop", [False, True])
def test_a_first_broadcast_that_does_not_return(
    joined: tuple[GroupWithServers, Any], monkeypatch: pytest.MonkeyPatch, others_stop: bool
) -> None:
    """As with NCCL when a server has died after it had agreed to join: there the call itself waits, without a limit."""
    group, _ = joined
    over = threading.Event()
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: over.wait(30.0))
    began = time.monotonic()
    try:
        with pytest.raises(Stopped if others_stop else TimeoutError):
            group.broadcast(torch.zeros(8), lambda: others_stop and time.monotonic() - began > 0.1)
    finally:
        over.set()
    assert time.monotonic() - began < (0.1 if others_stop else LIMIT_S) + 3


@pytest.mark.parametrize("before", [None, "0"])
def test_nccl_has_no_watchdog_that_would_end_the_trainer(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """torch reads the variable when it makes a group. Those of the trainer itself keep what the user chose."""
    if before is None:
        monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    else:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    seen: list[str | None] = []

    def make(*_: Any, **__: Any) -> tuple[str, None]:
        seen.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))
        return "group", None

    monkeypatch.setattr(c10d, "_new_process_group_helper", make)
    monkeypatch.setitem(c10d._world.pg_group_ranks, "group", {})  # and taken out again
    GroupWithServers("watched", 2, "nccl", LIMIT_S).join(never)
    assert seen == ["1"]
    assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before
