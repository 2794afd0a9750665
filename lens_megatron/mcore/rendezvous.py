"""Rank 0 works while the others wait: on the store, with a heartbeat, never inside a collective.

A collective that waits for minutes cannot tell a slow rank from a dead one, and on GPU it spins. Here the waiting ranks
see rank 0's sign of life, its result, or its error.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lens_megatron.errors import RunError, UsageError

T = TypeVar("T")
_BEAT_S = 2.0
_turns = 0


def from_rank_zero(work: Callable[[], T], what: str, silence_s: float = 120.0) -> T:
    """The result of `work`, done by rank 0 alone, on every rank. `silence_s` without a sign of life ends the wait."""
    global _turns
    if dist.get_world_size() == 1:
        return work()
    _turns += 1
    key = f"lens/turn/{_turns}"
    store = dist.distributed_c10d._get_default_store()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        with _heartbeat(store):
            try:
                box[0] = work()
            except BaseException as error:
                kind = "usage" if isinstance(error, UsageError) else "run"
                store.set(key, f"{kind}:{error or type(error).__name__}")
                raise
        store.set(key, "done")
    else:
        _wait(store, key, what, silence_s)
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _wait(store: Any, key: str, what: str, silence_s: float) -> None:
    last_beat, silent = b"", 0.0
    while True:
        with contextlib.suppress(dist.DistStoreError):
            store.wait([key], datetime.timedelta(seconds=_BEAT_S))
            break
        beat = store.get("lens/beat") if store.check(["lens/beat"]) else b""
        silent = 0.0 if beat != last_beat else silent + _BEAT_S
        last_beat = beat
        if silent > silence_s:
            raise RunError(f"rank {dist.get_rank()} waited for rank 0 to {what}: no sign of life for {silent:.0f} s")
    answer = store.get(key).decode()
    kind, _, message = answer.partition(":")
    if kind == "usage":
        raise UsageError(message)
    if kind == "run":
        raise RunError(f"rank 0 failed to {what}: {message}")


@contextlib.contextmanager
def rank_zero_alive() -> Iterator[None]:
    """Around work of all ranks that the others may be done with long before rank 0: those wait in the next
    `from_rank_zero`, and see its sign of life."""
    if dist.get_world_size() == 1 or dist.get_rank() != 0:
        yield
        return
    with _heartbeat(dist.distributed_c10d._get_default_store()):
        yield


@contextlib.contextmanager
def _heartbeat(store: Any) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(_BEAT_S):
            number += 1
            store.set("lens/beat", str(number))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
