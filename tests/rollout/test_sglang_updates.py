"""What happens to servers and their rollouts when something fails while weights are on their way. Stub servers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_seat import Seat
from lens_megatron.rollout.sglang_server import free_port
from tests.rollout.test_sglang_engine import FAST, check, drain, engine_of, name_weights, requests, stubs, sync


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end_update(engine: SGLangEngine, version: int) -> None:
    addresses = engine.servers()
    for address in addresses:
        name_weights(address, version)
    engine.end_update(addresses)


def test_the_rollouts_of_a_server_that_hung_during_a_sync_go_elsewhere() -> None:
    with stubs(["--token-seconds", "0.02"], ["--token-seconds", "0.02"]) as two, engine_of(two) as engine:
        wanted = requests(10, 60)
        engine.submit(wanted)
        until(lambda: len(engine._pool.seats[1].jobs) == 5)
        two[1].signal(signal.SIGSTOP)
        try:
            sync(engine, 4, count=1)
            assert engine._pool.seats[1].state == "starting"
            check(drain(engine, 10, 10.0), wanted, version=4)
        finally:
            two[1].signal(signal.SIGCONT)


def test_a_server_that_came_back_during_a_sync_only_waits_for_the_next() -> None:
    with stubs([], []) as two, engine_of(two) as engine:
        engine.begin_update(4)
        seat = engine._pool.seats[1]
        engine._loop.loop.call_soon_threadsafe(engine._pool.lost, seat, "made up")
        until(lambda: seat.starts == 2 and seat.state == "quarantined")
        first = engine._pool.seats[0].address
        name_weights(first, 4)
        engine.end_update([first])
        assert (seat.starts, len(engine._pool.ready())) == (2, 1)
        sync(engine, 5)
        assert (seat.starts, len(engine._pool.ready())) == (2, 2)


def test_servers_that_somebody_else_runs_are_not_started_again() -> None:
    with stubs([]) as one, engine_of(one) as engine:
        engine.begin_update(4)
        assert not engine.restart_servers(engine.servers(), "made up")
        assert [seat.state for seat in engine._pool.seats] == ["quarantined"]
        end_update(engine, 4)


def test_what_a_server_answered_before_it_was_lost_does_not_condemn_it_when_it_is_back() -> None:
    with stubs(["--token-seconds", "0.01"]) as one, engine_of(one) as engine:
        (seat,) = engine._pool.seats
        wanted = [Request("r0", (4, 5), 30)]
        engine.submit(wanted)
        engine.begin_update(4)
        until(lambda: bool(seat.held))
        engine._loop.loop.call_soon_threadsafe(engine._pool.lost, seat, "made up")
        until(lambda: seat.starts == 2 and seat.state == "quarantined")
        end_update(engine, 4)
        check(drain(engine, 1), wanted, version=4)
        assert seat.starts == 2


def test_a_connection_that_breaks_during_an_update_costs_no_server() -> None:
    with stubs(["--token-seconds", "0.01", "--fault", "first_dropped"]) as one, engine_of(one) as engine:
        (seat,) = engine._pool.seats
        wanted = [Request("r0", (4, 5), 30)]
        engine.submit(wanted)
        until(lambda: bool(seat.jobs))
        engine.begin_update(4)
        loop, client = EventLoop(), SGLangClient(seat.client.url)
        loop.run(client.set_weight_version("unfinished-4"))  # as the weight sync does
        loop.run(client.close())
        loop.close()
        until(lambda: not seat.jobs)
        assert not seat.held and seat.state == "quarantined"
        end_update(engine, 4)
        check(drain(engine, 1), wanted, version=4)
        assert seat.starts == 1


@pytest.mark.parametrize("take_over", [True, False])
def test_a_server_left_paused_by_a_killed_trainer(take_over: bool) -> None:
    with stubs([]) as one:
        config = ServerConfig(**{**FAST, "start_timeout_s": 1.0, "urls": (one[0].url,)})
        loop, client = EventLoop(), SGLangClient(one[0].url)
        try:
            loop.run(client.set_weight_version("3"))
            loop.run(client.pause_generation("abort"))
            seats = [Seat("sglang_0", one[0].url, None, None, config, take_over)]
            if take_over:
                SGLangEngine(seats, config).close()
                assert loop.run(client.weight_version()) == "unsynced"
                assert loop.run(client.is_healthy(1.0))
            else:  # somebody else's: it may be in the middle of an update
                with pytest.raises(RunError, match="not ready within start_timeout_s = 1"):
                    SGLangEngine(seats, config)
                assert loop.run(client.weight_version()) == "3"
        finally:
            loop.run(client.close())
            loop.close()


class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None: ...


def test_a_url_that_is_no_sglang_server_is_not_waited_for() -> None:
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        config = ServerConfig(**{**FAST, "start_timeout_s": 60.0, "urls": (url,)})
        began = time.monotonic()
        with pytest.raises(RunError, match=r"sglang_0: no SGLang server of this run's: .*/health was refused \(404\)"):
            SGLangEngine([Seat("sglang_0", url, None, None, config)], config)
        assert time.monotonic() - began < 30.0
        other.shutdown()


def test_why_nobody_answered_is_said() -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    config = ServerConfig(**{**FAST, "start_timeout_s": 0.5, "urls": (nobody,)})
    with pytest.raises(RunError, match=r"not ready within start_timeout_s = 0.5: .*/health: ClientConnectorError"):
        SGLangEngine([Seat("sglang_0", nobody, None, None, config)], config)
