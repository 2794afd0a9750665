"""The engine that answers outside of a training run, with the weights of an HF folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lens_megatron.errors import UsageError
from lens_megatron.evaluation.config import GenerationConfig
from lens_megatron.precision import dtype_name
from lens_megatron.rollout.engine import Engine

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_engine import SGLangEngine
    from lens_megatron.rollout.sglang_server import ServerAddress

_NEVER_NAMED = ("default", "unsynced")  # SGLang's own, and that of servers we start


@contextmanager
def engine_for(config: GenerationConfig, folder: Path, positions: int, logs: Path) -> Iterator[Engine]:
    """Closed at the end. `positions`: the model's. `logs`: for servers that are started here."""
    if config.engine != "embedded":
        servers = _sglang(config, folder, positions, logs)
        try:
            yield servers
        finally:
            servers.close()
        return
    import torch

    from lens_megatron.rollout.embedded import EmbeddedEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.threads)
    embedded = EmbeddedEngine.from_folder(folder, config.slots, device, dtype_name(config.precision))
    try:
        yield embedded
    finally:
        embedded.close()


def _sglang(config: GenerationConfig, folder: Path, positions: int, logs: Path) -> SGLangEngine:
    """Ready. What its servers were started with counts as version 0."""
    from lens_megatron.rollout.sglang_engine import SGLangEngine
    from lens_megatron.rollout.sglang_seat import seats

    server = config.server if config.engine == "sglang" else replace(config.server, urls=(config.engine,))
    common = {"dtype": dtype_name(config.precision), "skip_tokenizer_init": True}
    found = seats(server, config.servers, str(folder.absolute()), logs.absolute(), 0, common, config.seed)
    engine = SGLangEngine(found, server, lambda address, version, _: _name_weights(address, version), positions)
    try:
        addresses = engine.servers()
        engine.begin_update(0)
        for address in addresses:
            _name_weights(address, 0)
        engine.end_update(addresses)
    except BaseException:
        engine.close()
        raise
    return engine


def _name_weights(address: ServerAddress, version: int) -> None:
    """The engine gives out tokens of weights that somebody vouches for, by their name. Weights that a training run named
    are its own: they may change at any time."""
    from lens_megatron.rollout.event_loop import EventLoop
    from lens_megatron.rollout.sglang_client import SGLangClient

    loop = EventLoop("name-weights")
    client = SGLangClient(address.url, address.api_key)
    try:
        found = loop.run(client.weight_version())
        if found not in (*_NEVER_NAMED, str(version)):
            raise UsageError(
                f"{address.url}: its weights are version {found!r} of a training run; evaluate the run's checkpoints instead"
            )
        loop.run(client.set_weight_version(str(version)))
    finally:
        loop.run(client.close())
        loop.close()
