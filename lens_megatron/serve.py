"""SGLang servers for other programs, or for a run on another machine: started, watched, started again, ended."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_seat import Seat
from lens_megatron.rollout.sglang_server import server_processes, write_private

LOOK_SECONDS = 1.0


def serve(model: Path, folder: Path, config: ServerConfig, count: int, first_port: int | None) -> None:
    """Until it is interrupted, or a server that may not be started again has died."""
    if config.urls:
        raise UsageError("serve: urls are servers that run already; leave them out to start some")
    processes = server_processes(config, count, str(model), folder, 0, {}, first_port=first_port)
    seats = [Seat(process.name, "", process.api_key, process, config) for process in processes]
    key_file = folder / "api_key"
    write_private(key_file, processes[0].api_key + "\n")
    loop = EventLoop("serve")
    try:
        _say(f"starting {count} SGLang server{'s' * (count > 1)} of {model}; logs in {folder}")
        loop.run(_bring_up(seats))
        urls = ",".join(seat.client.url for seat in seats)
        _say(f"ready; a run takes them with  rollout.engine=sglang 'rollout.server.urls=[{urls}]' "
             f"rollout.server.api_key_file={key_file}")  # fmt: skip
        loop.run(_watch(seats, config.restarts))
    finally:
        loop.run(_close(seats))
        loop.close()


async def _bring_up(seats: list[Seat]) -> None:
    await asyncio.gather(*(seat.bring_up() for seat in seats))
    for seat in seats:
        _say(f"{seat.name}: {seat.client.url}")


async def _watch(seats: list[Seat], restarts: int) -> None:
    while True:
        for seat in seats:
            if seat.process is not None and seat.process.has_ended:
                words = f"{seat.name} ended (exit code {seat.process.exit_code}): {seat.process.last_words()}"
                if restarts == 0:
                    raise RunError(f"{words}; {seat.process.log} tells more")
                restarts -= 1
                _say(f"{words}; starting it again")
                await _bring_up([seat])
        await asyncio.sleep(LOOK_SECONDS)


async def _close(seats: list[Seat]) -> None:
    await asyncio.gather(*(seat.close() for seat in seats))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
