"""One SGLang server as the engine sees it: where it is in its life, whose weights it has, what runs on it.

starting -> quarantined -> ready          a sync (or a resync from a snapshot) makes it ready
ready -> quarantined                      at the next update, or when it carries weights that no sync vouches for
any -> starting                           it died or hung, and is started again
any -> down                               it is to be started again, when the trainer has left its GPUs
any -> gone                               it may not
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lens_megatron.errors import RunError
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.sglang_client import Refused, SGLangClient, Unreachable
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_schema import OLDEST_SUPPORTED, Generation, ServerInfo
from lens_megatron.rollout.sglang_server import (
    UNSYNCED,
    ServerAddress,
    ServerProcess,
    read_api_key,
    server_processes,
)
from lens_megatron.rollout.sglang_supervised import SupervisedServer, supervised_folder

State = Literal["down", "starting", "quarantined", "ready", "gone"]
HEALTH_RETRY_SECONDS = 0.25
_NEVER_WELL = (401, 403, 404, 405)  # of /health, at a URL that was given: whoever answers so is no SGLang
END_LOOKS, END_LOOK_SECONDS = 10, 0.1
DEFAULT_SLOTS = 64  # of a server that does not tell how many requests it runs at once


@dataclass(eq=False)
class Job:
    """A request on its way: at most one attempt of it is alive at any time, so it cannot be done twice."""

    request: Request
    attempts: int = 0
    cancelled: bool = False  # by us: it must come back, and nothing more
    server_id: str = ""  # of this attempt; the server knows no other
    epoch: int = 0  # of its server's weights when the attempt began
    task: asyncio.Task[None] | None = None


class Seat:
    def __init__(
        self,
        name: str,
        url: str,
        api_key: str | None,
        process: ServerProcess | None,
        config: ServerConfig,
        take_over: bool = False,
    ):
        """`take_over`: nobody else works with a server that was found, so it may be told to go on."""
        self.name, self.process, self.config, self._take_over = name, process, config, take_over
        self.client = SGLangClient(url, api_key, config.control_timeout_s)
        self.api_key = api_key
        self.state: State = "starting"
        self.reason = ""  # of not being ready
        self.starts = 0
        self.info: ServerInfo | None = None
        self.slots = 0
        # versions that a sync of this start vouches for, by the server's name for them
        self.accepted: dict[str, int] = {}
        self.epoch = 0  # grows with every update
        self.jobs: set[Job] = set()
        self.used_tokens, self.quiet_since = -1, time.monotonic()
        self.held: list[tuple[Job, Generation]] = []  # came back during an update, to be judged at its end

    @property
    def address(self) -> ServerAddress:
        info = self.info
        version, tp, dp, pp = (info.version, info.tp, info.dp, info.pp) if info else ((0, 0, 0), 1, 1, 1)
        shares = self.process is not None and self.process.shares_memory
        return ServerAddress(self.name, self.client.url, self.api_key, self.starts, version, tp, dp, pp, shares)

    async def bring_up(self) -> None:
        """Starts it where it is ours, and waits until it answers; then it is quarantined."""
        self.state, self.accepted, self.info = "starting", {}, None
        if self.process is not None:
            await asyncio.to_thread(self.process.start)
            await self.client.close()
            self.client = SGLangClient(self.process.url, self.api_key, self.config.control_timeout_s)
        self.starts += 1
        await self._until_ready()
        info = await self.client.server_info()
        if info.version < OLDEST_SUPPORTED:
            have, least = (".".join(map(str, version)) for version in (info.version, OLDEST_SUPPORTED))
            raise RunError(f"{self.name} ({self.client.url}) is SGLang {have}: at least {least} is needed")
        self.info, self.slots = info, info.most_running or DEFAULT_SLOTS
        self.state, self.reason = "quarantined", "it has had no weights yet"
        self.used_tokens, self.quiet_since = -1, time.monotonic()

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while not await self._is_healthy(min(30.0, self.config.start_timeout_s)):
            if self.process is not None and self.process.has_ended:
                raise RunError(
                    f"{self.name} ended while starting (exit code {self.process.exit_code}): "
                    f"{self.process.last_words()}; {self.process.log} tells more"
                )
            why = self.client.unwell
            if self.process is None and isinstance(why, Refused) and why.status in _NEVER_WELL:
                raise RunError(f"{self.name}: no SGLang server of this run's: {why}")
            if time.monotonic() > deadline:
                where = f"; see {self.process.log}" if self.process else f": {why}" if why is not None else ""
                raise RunError(
                    f"{self.name} ({self.client.url}) was not ready within start_timeout_s = "
                    f"{self.config.start_timeout_s:g}{where}"
                )
            await asyncio.sleep(HEALTH_RETRY_SECONDS)

    async def _is_healthy(self, limit: float) -> bool:
        if self._take_over:  # paused by a trainer that was killed, it would never say that it is well
            with contextlib.suppress(RunError):
                await self.client.set_weight_version(UNSYNCED, limit)  # first: what goes on has nobody's weights
                await self.client.continue_generation(limit)
        return await self.client.is_healthy(limit)

    def quarantine(self, reason: str) -> None:
        if self.state == "ready":
            self.state, self.reason = "quarantined", reason

    def accept(self, version: int, label: str) -> None:
        """A sync vouches for its weights."""
        self.accepted[label] = version
        self.state, self.reason, self.epoch = "ready", "", self.epoch + 1
        self.used_tokens, self.quiet_since = -1, time.monotonic()

    async def still_has_its_weights(self) -> bool:
        """After a lost connection: whether this is the same server with weights that a sync vouches for."""
        if self.process is not None and self.process.has_ended:
            return False
        try:
            return await self.client.weight_version(min(10.0, self.config.silence_s)) in self.accepted
        except RunError:
            return False

    async def why_lost(self, error: Exception) -> str:
        """What a lost connection means: a process that ends does so a moment after its connections."""
        for _ in range(END_LOOKS):
            if self.process is None or self.process.has_ended:
                break
            await asyncio.sleep(END_LOOK_SECONDS)
        return self._end() or str(error)

    def _end(self) -> str | None:
        if self.process is None or not self.process.has_ended:
            return None
        return f"it ended (exit code {self.process.exit_code}): {self.process.last_words()}; see {self.process.log}"

    async def trouble(self) -> str | None:
        """What is wrong with it, asked while rollouts run on it; None when it gets on."""
        if (end := self._end()) is not None:
            return end
        routed = self.config.router is not None  # then only the server knows what it was given
        if self.state != "ready" or not (self.jobs or routed):
            self.quiet_since = time.monotonic()
            return None
        try:
            load = await self.client.load(self.config.silence_s)
        except Unreachable as error:
            return None if await self.still_has_its_weights() else str(error)
        except RunError as error:
            return str(error)
        now, busy_with = time.monotonic(), load.running + load.waiting if routed else len(self.jobs)
        if load.used_tokens != self.used_tokens or not busy_with:
            self.used_tokens, self.quiet_since = load.used_tokens, now
        elif now - self.quiet_since > self.config.silence_s:
            return f"it has sampled nothing for silence_s = {self.config.silence_s:g} with {busy_with} rollouts"
        return None

    def give_up_all(self) -> list[Job]:
        """What ran on it, and what it answered during an update, which cannot be judged any more."""
        jobs = [*self.jobs, *(job for job, _ in self.held)]
        self.held = []
        for job in jobs:
            if job.task is not None:
                job.task.cancel()
            self.leave(job)
        return jobs

    def leave(self, job: Job) -> None:
        self.jobs.discard(job)
        job.task = None

    async def close(self) -> None:
        await self.client.close()
        if self.process is not None:
            await asyncio.to_thread(self.process.stop)


def seats(
    config: ServerConfig,
    count: int,
    model: str,
    logs: Path,
    first_gpu: int,
    common: Mapping[str, Any],
    seed: int,
    take_over: bool = False,
) -> list[Seat]:
    """Of the servers at config.urls; without any, of `count` servers to be started here with the `common` arguments."""
    if config.urls:
        key = read_api_key(config)
        return [Seat(f"sglang_{number}", url, key, None, config, take_over) for number, url in enumerate(config.urls)]
    kind = SupervisedServer if supervised_folder() is not None else ServerProcess  # on nodes of their own, or here
    processes = server_processes(config, count, model, logs, first_gpu, common, seed, kind=kind)
    return [Seat(process.name, "", process.api_key, process, config) for process in processes]
