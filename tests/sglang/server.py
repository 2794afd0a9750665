"""Real SGLang servers on this machine's CPU, for tests. A server is three processes of some 650 MB and starts in 20-40 s,
so one is shared wherever it can be: see the fixtures in tests/sglang/conftest.py, which other folders may import.

    with servers(model_folder, folder, count=2) as started:      # list of ServerProcess, ready
        client = SGLangClient(started[0].url, started[0].api_key)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_server import ServerProcess, server_processes

from . import venv

LONGEST = 4096  # positions of the models whose responses are caught under way; servers take a model's own limit
# A response that is to be caught under way: at 300 to 500 tokens a second it outlasts a stall of the machine by far.
UNDER_WAY = 4000
UNDER_WAY_AND_AWAITED = 1500
START_SECONDS = 240.0  # alone on two cores it takes about 20 s
# what the real server needs to run without a GPU, and small; --sleep-on-idle is worth a factor of ten on two cores
CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "max_total_tokens": 17 * LONGEST,
    "max_running_requests": 16,
    "mem_fraction_static": 0.05,
    "skip_server_warmup": True,
    "grammar_backend": "none",
    "sleep_on_idle": True,
}
CPU_ENV = {
    "PYTHONPATH": str(Path(__file__).parent / "shim"),
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def cpu_config(env: dict[str, str] | None = None, args: dict[str, Any] | None = None, **changes: Any) -> ServerConfig:
    """`rollout.server` of a real server on CPU."""
    config = ServerConfig(
        python=str(venv.build()),
        args={**CPU_ARGS, **(args or {})},
        env={**CPU_ENV, **(env or {})},
        start_timeout_s=START_SECONDS,
        request_timeout_s=120.0,
        control_timeout_s=60.0,
        silence_s=60.0,
    )
    return replace(config, **changes)


def unpinned_command() -> tuple[str, ...]:
    """`rollout.server.command` of a server on CPU that is to return experts."""
    return str(venv.build()), str(Path(__file__).parent / "unpinned.py")


@contextlib.contextmanager
def servers(
    model: Path, folder: Path, count: int = 1, config: ServerConfig | None = None, **arguments: Any
) -> Iterator[list[ServerProcess]]:
    """`count` servers of an HF folder, ready to answer; their logs are in `folder`."""
    common = {"skip_tokenizer_init": True, **arguments}
    started = server_processes(config or cpu_config(), count, str(model), folder, 0, common)
    try:
        for server in started:
            server.start()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(wait_until_ready, started))
        yield started
    finally:
        for server in started:
            server.stop()


def wait_until_ready(server: ServerProcess, seconds: float = START_SECONDS) -> None:
    loop = EventLoop()
    client = SGLangClient(server.url, server.api_key)
    try:
        deadline = time.monotonic() + seconds
        while not loop.run(client.is_healthy(10.0)):
            assert not server.has_ended, f"{server.name} ended: {server.last_words()} ({server.log})"
            assert time.monotonic() < deadline, f"{server.name} not ready in {seconds:g} s: {server.last_words()}"
            time.sleep(0.2)
    finally:
        loop.run(client.close())
        loop.close()
