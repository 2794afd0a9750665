"""Real rollouts whose answers are late, garbage or of weights that nobody vouches for. The server is one, behind two
addresses: its own, and one where somebody spoils what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_server import UNSYNCED, ServerProcess
from tests.rollout import tiny
from tests.rollout.engine_cases import check_response, drain

from . import meddler
from .engines import give_weights, sglang_engine

pytestmark = pytest.mark.sglang
Connected = Callable[..., AbstractContextManager[SGLangEngine]]


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model(0, tied=False)


@pytest.fixture
def between(real_server: ServerProcess) -> Iterator[meddler.Meddler]:
    with meddler.meddler(real_server.url) as one:
        yield one


@pytest.fixture
def connected(real_server: ServerProcess, tiny_folder: Path, tmp_path: Path) -> Connected:
    """connected(url, ...): an engine of servers at these addresses, with weights of version 0."""
    (tmp_path / "key").write_text(real_server.api_key)

    @contextmanager
    def connect(*urls: str, **changes: Any) -> Iterator[SGLangEngine]:
        limits = {"control_timeout_s": 30.0, "silence_s": 60.0, "start_timeout_s": 10.0, **changes}
        config = ServerConfig(urls=urls, api_key_file=str(tmp_path / "key"), **limits)
        with sglang_engine(tiny_folder, tmp_path, config) as engine:
            give_weights(engine, 0, tiny_folder)
            yield engine

    return connect


def rollouts(count: int, tokens: int = 30) -> list[Request]:
    return [Request(f"r{i}", (5 + i % 40, 6, 7), tokens, seed=i) for i in range(count)]


def done_whole(wanted: list[Request], engine: SGLangEngine, net: Any) -> None:
    engine.submit(wanted)
    done = drain(engine, len(wanted))
    for request in wanted:
        assert done[request.id].finish == "length"
        assert [(span.version, span.start) for span in done[request.id].versions] == [(0, 0)]
        check_response(net, request, done[request.id])


@pytest.mark.parametrize("how", [meddler.page, meddler.cut, meddler.logprob_missing, meddler.another_requests])
def test_garbage_is_never_taken_and_its_rollouts_are_done_elsewhere(
    how: meddler.Spoil, between: meddler.Meddler, connected: Connected, real_server: ServerProcess, net: Any
) -> None:
    with connected(between.url, real_server.url) as engine:
        between.spoil("/generate", how)
        done_whole(rollouts(20), engine, net)
        assert between.spoiled > 0
        assert engine.free_slots() <= 16, "no rollouts for it until a sync has reached it"


def test_garbage_from_the_only_server_ends_the_run_with_one_line(
    between: meddler.Meddler, connected: Connected
) -> None:
    with connected(between.url) as engine:
        between.spoil("/generate", meddler.page)
        engine.submit(rollouts(4))
        with pytest.raises(
            RunError, match=r"no SGLang server with the weights of version 0 is left: .* is no JSON"
        ) as said:
            drain(engine, 4)
        assert "\n" not in str(said.value)


def test_a_slow_server_is_waited_for(
    between: meddler.Meddler, connected: Connected, real_server: ServerProcess, net: Any
) -> None:
    with connected(between.url, real_server.url) as engine:
        between.spoil("/generate", meddler.late(3.0))
        began = time.monotonic()
        done_whole(rollouts(20), engine, net)
        assert between.spoiled > 0 and time.monotonic() - began > 3.0
        assert [seat.state for seat in engine._pool.seats] == ["ready", "ready"]


def test_a_server_too_slow_for_request_timeout_s_ends_the_run_in_time(
    between: meddler.Meddler, connected: Connected
) -> None:
    with connected(between.url, request_timeout_s=4.0) as engine:
        between.spoil("/generate", meddler.late(60.0))
        engine.submit(rollouts(3))
        began = time.monotonic()
        with pytest.raises(RunError, match=r"no answer within 4 s: raise rollout\.server\.request_timeout_s") as said:
            drain(engine, 3)
        assert time.monotonic() - began < 10 and "\n" not in str(said.value)


def test_rollouts_of_weights_that_nobody_vouches_for_are_never_given_out(
    connected: Connected, real_server: ServerProcess
) -> None:
    """Somebody else loads weights into the run's server while it generates."""
    with connected(real_server.url) as engine:
        engine.submit(rollouts(8, tokens=300))
        loop = EventLoop()
        client = SGLangClient(real_server.url, real_server.api_key)
        loop.run(client.set_weight_version("somebody-elses"))
        with pytest.raises(RunError, match="answers with weights somebody-elses, which no sync vouches for"):
            drain(engine, 8)
        loop.run(client.set_weight_version(UNSYNCED))
        loop.run(client.close())
        loop.close()
