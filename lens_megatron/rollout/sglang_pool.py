"""The servers of an engine: brought up, watched, given up and brought back, and their part of a weight update.

Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_schema import Generation
from lens_megatron.rollout.sglang_seat import Job, Seat
from lens_megatron.rollout.sglang_server import ServerAddress

Resync = Callable[[ServerAddress, int, str], None]  # server, version, the label it is to carry
WATCH_SECONDS = 2.0


class ServerPool:
    def __init__(
        self,
        seats: Sequence[Seat],
        config: ServerConfig,
        resync: Resync | None,
        on_lost: Callable[[list[Job]], None],
        on_failure: Callable[[RunError], None],
    ) -> None:
        """`on_lost` gets the rollouts of a server that was given up, and an empty list when one came back."""
        self.seats, self._config, self._resync = list(seats), config, resync
        self._on_lost, self._on_failure = on_lost, on_failure
        self._restarts_left = config.restarts
        self._chores: set[asyncio.Task[None]] = set()
        self.version, self.next_version, self.label = -1, -1, ""
        self._met: dict[Seat, int] = {}  # servers that an update began with: their starts
        self.updating = False
        self._may_start = True  # else the trainer is on the servers' GPUs
        self.progress = 0  # grows while servers sample, or are being started within their limit

    # what there is

    def ready(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.state == "ready"]

    def answering(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.state in ("quarantined", "ready")]

    def roomiest(self) -> Seat | None:
        """The least loaded server with a free slot."""
        free = [seat for seat in self.ready() if len(seat.jobs) < seat.slots]
        return min(free, key=lambda seat: len(seat.jobs) / seat.slots, default=None)

    def is_hopeless(self) -> bool:
        """No server has weights, and none will have any by itself."""
        return not self.updating and not any(seat.state in ("ready", "starting", "down") for seat in self.seats)

    def accepted(self) -> dict[str, int]:
        return {label: version for seat in self.seats for label, version in seat.accepted.items()}

    def states(self) -> str:
        return "; ".join(
            f"{seat.name} is {seat.state}{': ' if seat.reason else ''}{seat.reason}" for seat in self.seats
        )

    # life and death

    async def bring_up(self) -> None:
        starts = [asyncio.create_task(seat.bring_up()) for seat in self.seats]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:  # with one that cannot start there is no run
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
        self.chore(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            before = [(seat.used_tokens, len(seat.jobs)) for seat in self.seats]
            await asyncio.gather(*(self._look_after(seat) for seat in self.answering()))
            after = [(seat.used_tokens, len(seat.jobs)) for seat in self.seats]
            if before != after or self.updating or any(seat.state == "starting" for seat in self.seats):
                self.progress += 1

    async def _look_after(self, seat: Seat) -> None:
        start = seat.starts
        if (trouble := await seat.trouble()) and seat.starts == start and not self.updating:
            self.lost(seat, trouble)

    def lost(self, seat: Seat, reason: str) -> None:
        """It died, hung or cannot be trusted: what ran on it goes elsewhere, and it is started again if it may be."""
        if seat.state not in ("quarantined", "ready"):
            return
        seat.reason = reason
        if seat.process is None or self._restarts_left > 0:  # whoever runs another's server may start it again
            self._restarts_left -= seat.process is not None
            seat.state = "down"
            self._start_again()
        else:
            seat.state = "gone"
            self.chore(asyncio.to_thread(seat.process.stop))
        # behind a router nobody knows which rollouts were its
        self._on_lost([job for one in (self.seats if self._config.router else [seat]) for job in one.give_up_all()])

    def _start_again(self) -> None:
        """Those that are to be, unless their GPUs are the trainer's now."""
        for seat in self.seats if self._may_start else ():
            if seat.state == "down":
                seat.state = "starting"
                self.chore(self._bring_back(seat))

    async def _bring_back(self, seat: Seat) -> None:
        reason = seat.reason
        try:
            await seat.bring_up()
        except (RunError, UsageError, OSError) as error:
            seat.state, seat.reason = "gone", f"{reason}; not to be started again: {error}"
        else:
            seat.reason = f"{reason}; back, without weights until the next sync"
            await self._restore(seat)
        self._on_lost([])

    async def _restore(self, seat: Seat) -> None:
        """Weights from a snapshot, where there is one."""
        version, label, start = self.version, self.label, seat.starts
        if self._resync is None or self.updating or version < 0:
            return
        seat.state = "starting"
        try:
            await asyncio.to_thread(self._resync, seat.address, version, label)
        except (RunError, UsageError) as error:
            seat.reason = f"{seat.reason}; {error}"
        else:
            if seat.starts == start and label == self.label and not self.updating:
                seat.accept(version, label)
                return
        seat.state = "quarantined"

    # on shared GPUs

    async def trainers_turn(self) -> None:
        """Starts no server from now on, and waits for those that are starting: they take memory that nobody has asked them to
        release yet. Each has its start_timeout_s."""
        self._may_start = False
        await asyncio.gather(*(self._look_after(seat) for seat in self.answering()))  # what has ended cannot be asked
        while any(seat.state == "starting" for seat in self.seats):
            await asyncio.sleep(0.05)

    def engines_turn(self) -> None:
        self._may_start = True
        self._start_again()

    async def close(self) -> None:
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*(seat.close() for seat in self.seats), return_exceptions=True)

    # weights

    async def begin_update(self, version: int) -> None:
        """Waits for a server only while there is none: one that is being started again need not hold up the others."""
        self.updating, self.next_version = True, version
        while not self.answering() and any(seat.state == "starting" for seat in self.seats):
            await asyncio.sleep(0.05)
        self._met = {seat: seat.starts for seat in self.answering()}
        for seat in self.seats:
            seat.quarantine(f"weights of version {version} are on their way")

    async def restart(self, silent: Sequence[ServerAddress], reason: str) -> bool:
        """In an update that reached none: those of them that are this run's own. Waits for the first; whether one is back."""
        starts = {(address.url, address.start) for address in silent}
        own = [seat for seat in self.seats if seat.process is not None]
        for seat in own:
            if (seat.client.url, seat.starts) in starts:
                self.lost(seat, reason)
        starting = [seat for seat in own if seat.state == "starting"]
        while starting and all(seat.state == "starting" for seat in starting):
            await asyncio.sleep(0.05)
        return any(seat.state in ("quarantined", "ready") for seat in starting)

    async def end_update(
        self, synced: Sequence[ServerAddress], label: str | None = None
    ) -> list[tuple[Seat, Job, Generation]]:
        """What came back meanwhile, to be judged now."""
        if not self.updating:
            raise RunError("end_update without begin_update")
        given = {(address.url, address.start) for address in synced}
        took = [seat for seat in self.answering() if (seat.client.url, seat.starts) in given]
        if not took:
            raise RunError(f"weights of version {self.next_version} reached no SGLang server: {self.states()}")
        if self._config.router is not None and len(took) < len(self.seats):
            raise RunError(
                f"weights of version {self.next_version} did not reach every server behind the router, which would "
                f"send rollouts to the others too: {self.states()}"
            )
        self.version, self.updating = self.next_version, False
        self.label = str(self.version) if label is None else label
        for seat in took:
            seat.accept(self.version, self.label)
        for seat, starts in self._met.items():  # those that came back meanwhile only have to wait for the next update
            if seat not in took and seat.starts == starts:
                self.lost(seat, f"weights of version {self.version} did not reach it")
        held = [(seat, job, generation) for seat in self.seats for job, generation in seat.held]
        for seat in self.seats:
            seat.held = []
        return held

    # tasks that nobody waits for

    def chore(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chore_ended)
        return task

    def _chore_ended(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(RunError(f"the SGLang engine failed: {type(error).__name__}: {error}"))
