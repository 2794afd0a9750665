"""SGLang as an engine: requests out to the least loaded server, responses back, none lost and none done twice.

HTTP happens in a thread of its own, where jobs and servers are looked after; the driver's thread hands requests over and
takes finished responses from a queue. A rollout whose server died, hung or lost the connection is sent to another server,
or waits until its own has been started again and has its weights. A response is given out only if each of its tokens was
sampled with weights that a sync vouched for; else the server is given up and the rollout done again.

Weights do not pass through here: `begin_update` quarantines every server, the trainer's weight sync talks to the servers
itself (`servers`), and `end_update` is told which of them hold the new version whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import RunError, UsageError
from lens_megatron.machine import allow_many_sockets
from lens_megatron.rollout.engine import Finished, Health, Request, VersionSpan
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient, Unreachable
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_pool import Resync, ServerPool
from lens_megatron.rollout.sglang_schema import UNUSED_PLACES, Generation
from lens_megatron.rollout.sglang_seat import Job, Seat
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.routed_experts import Routers

if TYPE_CHECKING:
    import torch

ABORT_AGAIN_SECONDS = 0.5  # an abort that overtook its request found nothing
BUSY_SECONDS = 0.5  # doubled at every refusal
MOST_ATTEMPTS = 5  # of one rollout
SEED_BITS = 2**31 - 1  # what sampling_seed takes
CLOSE_SECONDS = 30.0
OBJECTS_A_COLLECTION = 200_000


class SGLangEngine:
    def __init__(
        self,
        seats: Sequence[Seat],
        config: ServerConfig,
        resync: Resync | None = None,
        positions: int | None = None,
        routers: Routers | None = None,
    ) -> None:
        """Returns when every server answers. `resync` loads a version whole into a restarted server, or raises.
        `positions` and `routers`: the model's; routers only of requests with `routing`."""
        # a response is a list a token: at Python's 700 of them a fifth of the client's time went into collecting garbage
        gc.set_threshold(OBJECTS_A_COLLECTION, *gc.get_threshold()[1:])
        allow_many_sockets()
        self._config, self._positions, self._routers = config, positions, routers
        self._loop = EventLoop("sglang")
        self._pool = ServerPool(seats, config, resync, self._resend, self._fail)
        self._router = (
            SGLangClient(config.router, seats[0].api_key, config.control_timeout_s) if config.router else None
        )
        self._finished: queue.SimpleQueue[Finished | RunError] = queue.SimpleQueue()
        self._in_flight: dict[str, Request] = {}  # the driver's thread's own account
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._failure: RunError | None = None
        self._nonce, self._count = secrets.token_hex(4), 0
        self._given = 0
        self._mean_tokens = 0.0  # of prompt and response
        try:
            self._loop.run(self._pool.bring_up())
        except BaseException:
            self.close()
            raise

    # the driver's thread

    @property
    def version(self) -> int:
        return -1 if self._pool.updating else self._pool.version

    @property
    def deterministic(self) -> bool:
        return False

    @property
    def positions(self) -> int | None:
        infos = [seat.info for seat in self._pool.seats if seat.info is not None]
        limits = [limit for info in infos if (limit := info.longest(self._positions)) is not None]
        return min(limits, default=self._positions)

    def clock(self) -> float:
        return time.monotonic()

    def submit(self, requests: Sequence[Request]) -> None:
        """During an update they wait for its end."""
        self._raise_failure()
        if self.version < 0 and not self._pool.updating:
            raise RunError("no SGLang server has a whole set of weights: sync them before sampling")
        longest = self.positions
        for request in requests:
            if request.id in self._in_flight:
                raise ValueError(f"request {request.id} is already in flight")
            if longest is not None and len(request.prompt) + request.max_tokens > longest:
                raise UsageError(
                    f"prompt of {len(request.prompt)} + response of {request.max_tokens} tokens exceeds the servers' "
                    f"{longest} (the least of their contexts and caches, less {UNUSED_PLACES}): lower "
                    "data.max_prompt_tokens or rollout.max_response_tokens, or give the servers more room"
                )
        self._in_flight.update({request.id: request for request in requests})
        self._loop.loop.call_soon_threadsafe(self._enter, [Job(request) for request in requests])

    def poll(self, timeout: float) -> list[Finished]:
        done: list[Finished] = []
        with contextlib.suppress(queue.Empty):
            item = self._finished.get(timeout=timeout) if self._in_flight else self._finished.get_nowait()
            while True:
                if isinstance(item, RunError):
                    raise item
                del self._in_flight[item.id]
                done.append(item)
                item = self._finished.get_nowait()
        return done

    def abort(self, ids: Iterable[str]) -> None:
        self._loop.loop.call_soon_threadsafe(self._abort, [i for i in ids if i in self._in_flight])

    def free_slots(self) -> int:
        """By the servers' slots, and by the room of their caches if responses are as long as they were so far."""
        ready = self._pool.ready()
        free = sum(seat.slots for seat in ready) - len(self._in_flight)
        caches = [seat.info.dp * (seat.info.kv_tokens or 0) if seat.info else None for seat in ready]
        if caches and all(caches) and self._mean_tokens:
            free = min(free, int(sum(filter(None, caches)) / self._mean_tokens) - len(self._in_flight))
        return max(0, free, int(bool(ready) and not self._in_flight))

    def begin_update(self, version: int) -> None:
        self._raise_failure()
        self._loop.run(self._pool.begin_update(version))

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None:
        raise RunError("SGLang's servers get weights by rollout.sync, not through the rollout driver")

    def end_update(self, synced: Sequence[ServerAddress] = (), label: str | None = None) -> None:
        """`synced`: the servers, as `servers` named them, that hold the version of begin_update whole and proved. `label`:
        what they call it, by default its number."""
        self._raise_failure()
        self._loop.run(self._end_update(synced, label))

    def restart_servers(self, silent: Sequence[ServerAddress], reason: str) -> bool:
        """Of an update that reached none: waits for the first, and whether one is back. Then begin it anew."""
        self._raise_failure()
        return self._loop.run(self._pool.restart(silent, reason))

    def trainers_turn(self) -> list[ServerAddress]:
        """On shared GPUs, before the trainer comes back to them: all servers that hold memory there. None is started until
        `engines_turn`."""
        self._raise_failure()
        self._loop.run(self._pool.trainers_turn())
        return self.servers()

    def engines_turn(self) -> list[ServerAddress]:
        """The trainer has left: the servers that answer; those that died meanwhile are being started."""
        addresses = self.servers()
        self._loop.loop.call_soon_threadsafe(self._pool.engines_turn)
        return addresses

    def servers(self) -> list[ServerAddress]:
        """Those that answer."""
        self._raise_failure()
        return [seat.address for seat in self._pool.answering()]

    def demand(self, key: str, unfit: Callable[[Mapping[str, Any]], str | None]) -> None:
        """UsageError for a server whose arguments do not fit the setting `key`; `unfit` says why."""
        for seat in self._pool.seats:
            if seat.info is not None and (why := unfit(seat.info.raw)) is not None:
                raise UsageError(f"{key}: {seat.name} ({seat.client.url}) {why}")

    def health(self) -> Health:
        running = sum(len(seat.jobs) for seat in self._pool.seats)
        detail = str(self._failure) if self._failure else self._pool.states()
        progress = self._given + self._pool.progress
        return Health(self._failure is None, running, len(self._waiting), self.version, progress, detail)

    def close(self) -> None:
        if not self._loop.loop.is_closed():
            with contextlib.suppress(Exception):
                self._loop.start(self._close()).result(CLOSE_SECONDS)
            self._loop.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # the loop's thread

    def _enter(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._jobs[job.request.id] = job
            self._waiting.append(job)
        self._dispatch()

    def _dispatch(self) -> None:
        """What waits, to the least loaded servers that have room. With a router a seat only counts: the router chooses."""
        while self._waiting and (seat := self._pool.roomiest()) is not None:
            job = self._waiting.popleft()
            self._count += 1
            job.server_id, job.epoch = f"{self._nonce}-{self._count:012d}", seat.epoch
            job.attempts += 1
            seat.jobs.add(job)
            job.task = self._pool.chore(self._attempt(seat, job))
        if self._waiting and self._pool.is_hopeless():
            left = f"no SGLang server with the weights of version {self._pool.version} is left"
            self._fail(RunError(f"{left}: {self._pool.states()}"))

    async def _attempt(self, seat: Seat, job: Job) -> None:
        request = job.request
        try:
            generation = await (self._router or seat.client).generate(
                job.server_id,
                request.prompt,
                request.max_tokens,
                request.stop,
                request.temperature,
                request.top_p,
                request.seed & SEED_BITS,
                routers=self._routers if request.routing else None,
                timeout_s=self._config.request_timeout_s,
            )
        except RunError as error:
            await self._failed(seat, job, error)
        else:
            seat.leave(job)
            if self._pool.updating and generation.finish != "abort":
                seat.held.append((job, generation))  # whose weights these are is known at the update's end
            else:
                self._judge(seat, job, generation)
        self._dispatch()

    async def _failed(self, seat: Seat, job: Job, error: RunError) -> None:
        """An attempt that brought no response."""
        start = seat.starts
        if isinstance(error, Unreachable) and error.timed_out:
            self._fail(RunError(f"{error}: raise rollout.server.request_timeout_s, or see what the server does"))
        elif isinstance(error, Refused) and error.status in (429, 503):
            await asyncio.sleep(BUSY_SECONDS * 2**job.attempts)
        elif isinstance(error, Refused) and error.status < 500:
            self._fail(error)
        elif self._router is not None:
            await asyncio.sleep(BUSY_SECONDS * 2**job.attempts)
        elif not isinstance(error, Unreachable) or not await self._may_go_on(seat):
            reason = await seat.why_lost(error)
            if seat.starts == start and job in seat.jobs:
                self._pool.lost(seat, reason)  # which sends this job elsewhere as well
            return
        if job in seat.jobs:
            seat.leave(job)
            self._again(job, error)

    async def _may_go_on(self, seat: Seat) -> bool:
        """After a broken connection. During an update its weights bear no known name; the update's end gives it up if it
        was not reached."""
        return self._pool.updating or await seat.still_has_its_weights() or self._pool.updating

    def _judge(self, seat: Seat, job: Job, generation: Generation) -> None:
        """Given out, if it is known whose tokens these are."""
        spans = generation.versions
        if not spans and job.epoch == seat.epoch:  # a server that does not tell when its weights changed
            spans = ((generation.version, 0, len(generation.tokens)),)
        accepted = seat.accepted if self._router is None else self._pool.accepted()
        unknown = sorted({label for label, _, _ in spans} - accepted.keys())
        if generation.finish == "abort" and (unknown or not spans):
            self._give(job, None, ())
            return
        if unknown or not spans:
            self._again(job)
            # behind a router nobody knows whose answer it is; and what was begun before the server's weights were vouched
            # for may have met an attempt that was not
            if unknown and self._router is None and job.epoch == seat.epoch:
                self._pool.lost(seat, f"it answers with weights {', '.join(unknown)}, which no sync vouches for")
            return
        self._give(job, generation, tuple(VersionSpan(accepted[label], first, end) for label, first, end in spans))

    def _give(self, job: Job, generation: Generation | None, spans: tuple[VersionSpan, ...]) -> None:
        if self._jobs.pop(job.request.id, None) is None:
            return
        self._given += 1
        if generation is None:
            self._finished.put(Finished(job.request.id, (), (), "abort"))
            return
        if generation.finish != "abort":
            total = len(job.request.prompt) + len(generation.tokens)
            self._mean_tokens += (total - self._mean_tokens) * (0.02 if self._mean_tokens else 1.0)
        self._finished.put(
            Finished(
                job.request.id, generation.tokens, generation.logprobs, generation.finish, spans, generation.routing
            )
        )

    def _resend(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._again(job)
        self._dispatch()

    def _again(self, job: Job, error: RunError | None = None) -> None:
        """Before anything that has not been tried."""
        if job.cancelled:
            self._give(job, None, ())
        elif job.attempts >= MOST_ATTEMPTS:
            why = f"a rollout was begun {job.attempts} times and never came to an end{f', last: {error}' if error else ''}"
            self._fail(RunError(f"{why}: {self._pool.states()}"))
        elif job.request.id in self._jobs:
            self._waiting.appendleft(job)

    def _abort(self, ids: Sequence[str]) -> None:
        for job in [self._jobs[i] for i in ids if i in self._jobs]:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._give(job, None, ())
            elif job.task is not None:
                holders = [seat for seat in self._pool.seats if self._router is not None or job in seat.jobs]
                self._pool.chore(self._abort_on_servers(job, job.task, holders))

    async def _abort_on_servers(self, job: Job, task: asyncio.Task[Any], holders: Sequence[Seat]) -> None:
        """Until it has come back; of a server that does not answer it is taken away."""
        deadline, server_id = time.monotonic() + self._config.control_timeout_s, job.server_id
        while not task.done() and time.monotonic() < deadline:
            for seat in holders:
                with contextlib.suppress(RunError):
                    await seat.client.abort_request(server_id, max(0.1, deadline - time.monotonic()))
            await asyncio.wait([task], timeout=ABORT_AGAIN_SECONDS)
        if not task.done():
            task.cancel()
            for seat in holders:
                seat.jobs.discard(job)
            self._give(job, None, ())

    async def _end_update(self, synced: Sequence[ServerAddress], label: str | None) -> None:
        for seat, job, generation in await self._pool.end_update(synced, label):
            self._judge(seat, job, generation)
        self._dispatch()

    def _fail(self, error: RunError) -> None:
        if self._failure is None:
            self._failure = error
            self._finished.put(error)

    async def _close(self) -> None:
        await self._pool.close()
        if self._router is not None:
            await self._router.close()
