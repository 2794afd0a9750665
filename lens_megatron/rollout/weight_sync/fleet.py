"""The servers of one sync, asked together. One that does not do what it is asked for is lost to this sync, with a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from lens_megatron.errors import RunError
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient, Unreachable
from lens_megatron.rollout.sglang_schema import Generation, ServerInfo, stale_in_place
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.routed_experts import Routers

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_server import ServerAddress

T = TypeVar("T")
Verb = Callable[[SGLangClient], Coroutine[Any, Any, T]]
LOOK_SECONDS = 10.0
LEAVE_SECONDS = 5.0


def unfinished(version: int | str) -> str:
    """What servers call weights until all of them are there and proved, so that no response can pass for one of whole ones."""
    return f"unfinished-{version}"


class SyncFailed(RunError):
    """No server, or not the whole of it, has the new weights by this transport."""


@dataclass
class Fleet:
    clients: dict[str, SGLangClient]
    loop: EventLoop
    config: SyncConfig
    infos: dict[str, ServerInfo] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # url -> why
    silent: set[str] = field(default_factory=set)  # those of them that gave no answer: dead, or hanging
    sharing: frozenset[str] = frozenset()  # those that can map this process's shared memory

    @classmethod
    def meet(cls, addresses: Iterable[ServerAddress], loop: EventLoop, config: SyncConfig) -> Fleet:
        """Those of the servers that answer."""
        addresses = list(addresses)
        clients = {a.url: SGLangClient(a.url, a.api_key, config.timeout_s) for a in addresses}
        fleet = cls(clients, loop, config, sharing=frozenset(a.url for a in addresses if a.shares_memory))
        fleet.infos = fleet.each(lambda server: server.server_info(min(LOOK_SECONDS, config.timeout_s)))
        return fleet

    @property
    def live(self) -> list[str]:
        return [url for url in self.clients if url not in self.lost]

    def look_again(self) -> None:
        """Those that were lost get another chance, if they answer."""
        self.lost, self.silent = {}, set()
        self.infos = self.each(lambda server: server.server_info(min(LOOK_SECONDS, self.config.timeout_s)))

    def ranks(self, url: str) -> int:
        """Processes of the server that hold weights of their own."""
        info = self.infos[url]
        return info.tp * info.pp

    def start(self, verb: Verb[T]) -> dict[str, Future[T]]:
        """`verb` asked of every live server; the answers are to be taken with `collect`."""
        return {url: self.loop.start(verb(self.clients[url])) for url in self.live}

    def collect(self, asked: Mapping[str, Future[T]], all_or_none: bool = False) -> dict[str, T]:
        """Answers of the servers that did it; the others are lost. `all_or_none`: the first that fails is an error at
        once, for what all must do together: the others may be waiting for it."""
        url_of = {future: url for url, future in asked.items()}
        answers: dict[str, T] = {}
        waiting: set[Future[T]] = set(url_of)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                url = url_of[future]
                try:
                    answers[url] = future.result()
                except RunError as error:  # also a bad answer: one server's failure, never the run's
                    self.lost[url] = str(error)
                    if isinstance(error, Unreachable):
                        self.silent.add(url)
                    if all_or_none:
                        raise SyncFailed(str(error)) from None
        return answers

    def each(self, verb: Verb[T]) -> dict[str, T]:
        return self.collect(self.start(verb))

    def need_one(self) -> None:
        if not self.live:
            raise SyncFailed("; ".join(self.lost.values()) or "there is no rollout server")

    # the hand-over

    def hold(self, label: str, by_disk: bool, scrambled: Callable[[ServerInfo], bool]) -> None:
        """Generation paused, no cached key or value left but of rollouts that stay in place, and weights expected. `label`:
        the version's `unfinished` name."""
        mode = "abort" if self.config.in_flight == "wait" else self.config.in_flight
        if mode == "in_place":  # asked at every sync: a server may have been started again by somebody else
            for url in self.live:
                if (why := stale_in_place(self.infos[url].raw)) is not None:
                    self.refuse(url, f"{url} {why}")
        self.each(lambda server: server.pause_generation(mode))
        self.each(lambda server: server.set_weight_version(label))
        flush = {"in_place": _flush_if_idle, "retract": _flush, "abort": _drain_and_flush}[mode]
        idle = self.each(flush)
        self.each(self._end_any if by_disk else self._begin)
        # rollouts in place shall meet no random weights, should one of them not stand still
        self.each(lambda server: _scramble(server, idle[server.url] and scrambled(self.infos[server.url])))
        self.need_one()

    async def _begin(self, server: SGLangClient) -> None:
        if not self.infos[server.url].has_sessions:
            return
        try:
            await server.begin_weight_update()
        except Refused as error:
            if "already open" not in error.message:
                raise
            await server.end_weight_update()  # of a sync that failed half-way
            await server.begin_weight_update()

    async def _end_any(self, server: SGLangClient) -> None:
        """A session that a transport before this one, or a trainer that died, left open."""
        with contextlib.suppress(Refused):  # none is
            await self._end(server)

    async def _end(self, server: SGLangClient) -> None:
        if self.infos[server.url].has_sessions:
            await server.end_weight_update()

    def end_session(self) -> None:
        self.each(self._end)

    def release(self, label: str) -> None:
        self.each(lambda server: server.set_weight_version(label))
        self.each(lambda server: server.continue_generation())

    def dismiss(self, label: str) -> None:
        """Servers that are lost, as far as they still answer: no response of theirs shall pass for one of good weights, and
        they shall not look hung, which a paused one does."""
        limit = min(LOOK_SECONDS, self.config.timeout_s)

        async def let_go(server: SGLangClient) -> None:
            await server.set_weight_version(label, limit)
            await server.continue_generation(limit)

        asked = [self.loop.start(let_go(self.clients[url])) for url in self.lost if url in self.infos]
        for future in asked:
            with contextlib.suppress(RunError):
                future.result()

    def leave_groups(self, names: Sequence[str]) -> None:
        """The trainer leaves these groups as this is asked: a server whose peer on the same machine stayed would wait for it.
        Each holds a communicator on the server's GPUs. One that does not do it, or is in none of them, is as good as before."""

        async def leave(server: SGLangClient) -> None:
            for name in names:
                with contextlib.suppress(Refused):  # it was started again since, or never got in
                    await server.destroy_weights_update_group(name, LEAVE_SECONDS)

        # lost ones too, if they answer: they may be somebody else's, and outlive this run
        for future in [self.loop.start(leave(self.clients[url])) for url in self.clients if url in self.infos]:
            with contextlib.suppress(RunError):
                future.result()

    def refuse(self, url: str, reason: str) -> None:
        """Its weights are not what they should be."""
        self.lost[url] = reason

    def close(self) -> None:
        for client in self.clients.values():
            self.loop.run(client.close())

    # proof

    def probe(self, tokens: Sequence[int], label: str, routers: Routers | None) -> dict[str, Generation]:
        """What every live server says of the tokens; one that names another version is lost."""
        answers = self.each(lambda server: server.probe(f"probe/{label}/", tokens, routers))
        for url, answer in answers.items():
            if answer.version != label:
                self.refuse(url, f"{url} says that its weights are version {answer.version!r}, synced was {label!r}")
        return {url: answer for url, answer in answers.items() if url not in self.lost}

    def checksums(self) -> dict[str, Mapping[str, Any]]:
        """Of the servers that offer them."""

        async def ask(server: SGLangClient) -> Mapping[str, Any]:
            try:
                return await server.weight_checksums()
            except Refused:
                return {}

        return {url: answer for url, answer in self.each(ask).items() if answer}


async def _flush(server: SGLangClient) -> bool:
    await server.flush_cache()
    return True


async def _drain_and_flush(server: SGLangClient) -> bool:
    await server.flush_cache(drains=True)
    return True


async def _flush_if_idle(server: SGLangClient) -> bool:
    return await server.flush_cache_if_idle()


async def _scramble(server: SGLangClient, wanted: bool) -> None:
    if wanted:
        with contextlib.suppress(Refused):  # older servers have no such action: then the probe shows what it can
            await server.check_weights("reset_tensors")
