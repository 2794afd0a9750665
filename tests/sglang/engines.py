"""Engines of real servers, and weights for them without a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_pool import Resync
from lens_megatron.rollout.sglang_seat import seats
from lens_megatron.rollout.sglang_server import ServerAddress


@contextlib.contextmanager
def sglang_engine(
    model: Path, logs: Path, config: ServerConfig, count: int = 1, resync: Resync | None = None
) -> Iterator[SGLangEngine]:
    """Started and watched by the engine, or at config.urls; without weights."""
    engine = SGLangEngine(
        seats(config, count, str(model), logs, 0, {"skip_tokenizer_init": True}, seed=0), config, resync
    )
    try:
        yield engine
    finally:
        engine.close()


def load_weights(address: ServerAddress, version: int, folder: Path) -> None:
    """All weights of an HF folder into one server, paused and flushed."""

    async def load() -> None:
        server = SGLangClient(address.url, address.api_key, 60.0)
        try:
            await server.pause_generation("abort")
            await server.flush_cache()
            await server.update_weights_from_disk(str(folder), str(version))
            await server.continue_generation()
        finally:
            await server.close()

    loop = EventLoop()
    try:
        loop.run(load())
    finally:
        loop.close()


def give_weights(engine: Any, version: int, folder: Path) -> None:
    engine.begin_update(version)
    addresses = engine.servers()
    for address in addresses:
        load_weights(address, version, folder)
    engine.end_update(addresses)
