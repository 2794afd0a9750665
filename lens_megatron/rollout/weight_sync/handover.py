"""Trainer and servers on the same GPUs, by turns (`placement: colocated`). Every rank calls.

    engine's turn    trainer's weights, gradients and optimizer leave the GPU, what stays is held against the budget,
                     then, when all ranks have left, the servers take their KV cache
    trainer's turn   servers that are starting are waited for and none is started any more; all give up the KV cache, then
                     the trainer comes back
    before a sync    the trainer gives back what its allocator keeps, and the servers take memory for weights; in them nothing
                     is kept, so that they stay until the rollouts of the step are done

Resuming memory that was not released kills an SGLang server, so what was released of which start of which server is
written down here. On a GPU none of this has run yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from lens_megatron.errors import RunError
from lens_megatron.mcore.offload import Residence, give_back_cache, residual_bytes
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import MemoryTag, SGLangClient, Unreachable
from lens_megatron.rollout.sglang_server import ServerAddress

GIB = 2**30


class Servers(Protocol):
    """What the rollout driver offers: the servers that answer. None starts between `trainers_turn`, which returns when none
    is starting, and `engines_turn`."""

    def servers(self) -> Sequence[ServerAddress]: ...

    def trainers_turn(self) -> Sequence[ServerAddress]: ...

    def engines_turn(self) -> Sequence[ServerAddress]: ...


class ServerMemory:
    """What the servers hold of the shared GPUs; rank 0's."""

    def __init__(self, timeout_s: float) -> None:
        self._loop, self._timeout_s = EventLoop("server-memory"), timeout_s
        self._released: dict[tuple[str, int], set[str]] = {}

    def release(self, servers: Sequence[ServerAddress], *tags: MemoryTag) -> None:
        for server in servers:
            gone = self._released.setdefault((server.url, server.start), set())
            if wanted := [tag for tag in tags if tag not in gone]:
                # a server that is not idle yet would die of it
                self._ask(server, lambda client: client.flush_cache(drains=True))
                self._ask(server, partial(_release, tags=wanted))
                gone.update(wanted)

    def resume(self, servers: Sequence[ServerAddress], *tags: MemoryTag) -> None:
        for server in servers:
            gone = self._released.setdefault((server.url, server.start), set())
            if wanted := [tag for tag in tags if tag in gone]:
                with contextlib.suppress(Unreachable):  # it died or hangs: whoever looks after the servers finds that
                    self._ask(server, partial(_resume, tags=wanted))
                gone.difference_update(wanted)  # or so it may be

    def _ask(self, server: ServerAddress, verb: Callable[[SGLangClient], Any]) -> None:
        client = SGLangClient(server.url, server.api_key, self._timeout_s)
        try:
            self._loop.run(verb(client))
        finally:
            self._loop.run(client.close())


def _release(client: SGLangClient, tags: Sequence[MemoryTag]) -> Awaitable[None]:
    return client.release_memory_occupation(tags)


def _resume(client: SGLangClient, tags: Sequence[MemoryTag]) -> Awaitable[None]:
    return client.resume_memory_occupation(tags)


class Handover:
    """`memory` and `servers` are rank 0's. `on_rank_zero` runs there, and gives its error to every rank; `on_every_rank`
    returns when all are done, or raises everywhere."""

    def __init__(
        self,
        residence: Residence,
        on_rank_zero: Callable[[Callable[[], Any], str], Any],
        on_every_rank: Callable[[Callable[[], None]], None],
        servers: Servers | None,
        memory: ServerMemory | None,
        budget_gib: float,
    ) -> None:
        self._residence, self._on_rank_zero, self._servers = residence, on_rank_zero, servers
        self._on_every_rank = on_every_rank
        self._memory, self._budget_gib = memory, budget_gib
        self.residual_gib = 0.0  # of this rank, when it let go last

    def to_engine(self) -> None:
        if not self._residence.on_device:
            return
        # copies to the host take ranks different times: the servers have all GPUs' memory only when the last is gone
        self._on_every_rank(self._leave)
        self._ask(lambda memory, there: memory.resume(there.engines_turn(), "kv_cache"), "give the servers their cache")

    def _leave(self) -> None:
        self._residence.release()
        self.residual_gib = residual_bytes() / GIB
        if self.residual_gib > self._budget_gib:
            raise RunError(
                f"placement colocated: the trainer keeps {self.residual_gib:.1f} GiB of its GPU while the engine generates, "
                f"over memory.residual_gib {self._budget_gib:g}: raise it and lower rollout.server.args.mem_fraction_static"
            )

    def to_trainer(self, keep_engine_weights: bool) -> None:
        """`keep_engine_weights`: more is to be generated before the next sync."""
        tags: list[MemoryTag] = ["kv_cache"] if keep_engine_weights else ["kv_cache", "weights"]
        self._ask(lambda memory, there: memory.release(there.trainers_turn(), *tags), "take the servers' memory")
        self._residence.restore()

    def before_sync(self) -> None:
        if self._ask(lambda _, there: not there.servers(), "look for rollout servers"):
            # all died in the trainer's turn: they have room to start only while it is away
            self.to_engine()
            self.to_trainer(keep_engine_weights=False)
        # no server outlives that there is no room for its weights, and what training took for a moment is room
        self._on_every_rank(give_back_cache)
        self._ask(lambda memory, there: memory.resume(there.servers(), "weights"), "give the servers room for weights")

    def _ask(self, verb: Callable[[ServerMemory, Servers], Any], what: str) -> Any:
        def ask() -> Any:
            assert self._memory is not None and self._servers is not None
            return verb(self._memory, self._servers)

        return self._on_rank_zero(ask, what)
