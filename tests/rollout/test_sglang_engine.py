"""The SGLang engine against stub servers: faults that a real server cannot be asked for. tests/sglang has the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.engine import Finished, Request
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_seat import Seat
from lens_megatron.rollout.sglang_server import ServerAddress

FAST: dict[str, Any] = {"start_timeout_s": 5.0, "request_timeout_s": 20.0, "control_timeout_s": 3.0, "silence_s": 2.0}


@dataclass
class Stub:
    process: subprocess.Popen[str]
    url: str

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def stubs(*options: Sequence[str]) -> Iterator[list[Stub]]:
    """A stub server for each list of options."""
    started: list[Stub] = []
    try:
        for words in options:
            command = [sys.executable, "-m", "benchmarks.sglang_stub", *words]
            started.append(Stub(subprocess.Popen(command, stdout=subprocess.PIPE, text=True), ""))
        for stub in started:
            assert stub.process.stdout is not None
            stub.url = f"http://127.0.0.1:{int(stub.process.stdout.readline())}"
        yield started
    finally:
        for stub in started:
            stub.process.kill()
            stub.process.wait()


@contextlib.contextmanager
def engine_of(stubs: Sequence[Stub], version: int = 3, resync: Any = None, **changes: Any) -> Iterator[SGLangEngine]:
    """An engine of servers given by URL, whose weights are synced."""
    config = ServerConfig(**{**FAST, "urls": tuple(stub.url for stub in stubs), **changes})
    seats = [Seat(f"sglang_{i}", url, None, None, config) for i, url in enumerate(config.urls)]
    engine = SGLangEngine(seats, config, resync)
    try:
        sync(engine, version)
        yield engine
    finally:
        engine.close()


def name_weights(address: ServerAddress, label: int | str) -> None:
    loop = EventLoop()
    client = SGLangClient(address.url, address.api_key)
    loop.run(client.set_weight_version(str(label)))
    loop.run(client.close())
    loop.close()


def sync(engine: SGLangEngine, version: int, count: int | None = None) -> None:
    engine.begin_update(version)
    addresses = engine.servers()[:count]
    for address in addresses:
        name_weights(address, version)
    engine.end_update(addresses)


def requests(count: int, tokens: int = 50) -> list[Request]:
    return [Request(f"r{i}", (4 + i, 5), tokens, seed=i) for i in range(count)]


def drain(engine: SGLangEngine, count: int, seconds: float = 20.0) -> dict[str, Finished]:
    """`count` responses, each once."""
    done: dict[str, Finished] = {}
    deadline = time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < deadline, f"{len(done)} of {count}: {engine.health()}"
        for finished in engine.poll(0.5):
            assert finished.id not in done, "a rollout was done twice"
            done[finished.id] = finished
    assert engine.poll(0.0) == []
    return done


def check(done: dict[str, Finished], wanted: Sequence[Request], version: int = 3) -> None:
    for request in wanted:
        finished = done[request.id]
        expected = tuple((request.prompt[-1] + 7 * place) % 50000 for place in range(request.max_tokens))
        assert (finished.finish, finished.tokens) == ("length", expected)
        assert [(span.version, span.start, span.end) for span in finished.versions] == [(version, 0, len(expected))]


def test_every_rollout_comes_back_once_and_servers_share_them() -> None:
    with stubs([], []) as two, engine_of(two) as engine:
        wanted = requests(200)
        assert engine.free_slots() == 4096 and engine.version == 3
        engine.submit(wanted)
        assert engine.free_slots() == 4096 - 200
        running = [len(seat.jobs) for seat in engine._pool.seats]
        check(drain(engine, 200), wanted)
        assert engine.free_slots() > 0 and (not any(running) or min(running) > 50)


def test_nothing_is_sampled_before_weights_came() -> None:
    with stubs([]) as one:
        config = ServerConfig(**FAST, urls=(one[0].url,))
        engine = SGLangEngine([Seat("sglang_0", one[0].url, None, None, config)], config)
        with pytest.raises(RunError, match="no SGLang server has a whole set of weights"):
            engine.submit(requests(1))
        assert engine.version == -1 and engine.free_slots() == 0
        engine.begin_update(1)
        with pytest.raises(RunError, match=r"version 1 reached no SGLang server: sglang_0 is quarantined"):
            engine.end_update([])
        engine.close()


def test_a_killed_servers_rollouts_are_done_elsewhere() -> None:
    with stubs(["--token-seconds", "0.02"], ["--token-seconds", "0.02"]) as two, engine_of(two) as engine:
        wanted = requests(60)
        engine.submit(wanted)
        time.sleep(0.4)
        two[0].process.kill()
        check(drain(engine, 60), wanted)


def test_without_any_server_left_it_ends_with_one_line() -> None:
    with stubs(["--token-seconds", "0.1"]) as one, engine_of(one, start_timeout_s=1.0) as engine:
        engine.submit(requests(5))
        time.sleep(0.3)
        one[0].process.kill()
        with pytest.raises(RunError, match=r"no SGLang server with the weights of version 3 is left: sglang_0 is gone"):
            drain(engine, 5)
        with pytest.raises(RunError, match="no SGLang server"):
            engine.submit(requests(1))


def test_a_stopped_server_is_noticed_and_its_rollouts_go_elsewhere() -> None:
    with stubs(["--token-seconds", "0.05"], ["--token-seconds", "0.05"]) as two, engine_of(two) as engine:
        wanted = requests(40, 60)
        engine.submit(wanted)
        time.sleep(0.3)
        two[0].signal(signal.SIGSTOP)
        try:
            check(drain(engine, 40), wanted)
        finally:
            two[0].signal(signal.SIGCONT)


def test_a_server_that_samples_nothing_is_noticed() -> None:
    with stubs(["--token-seconds", "1000"], ["--token-seconds", "0.01"]) as two, engine_of(two) as engine:
        wanted = requests(10)
        engine.submit(wanted)
        check(drain(engine, 10), wanted)
        assert "sampled nothing for silence_s = 2" in engine.health().detail


def test_behind_a_router_a_server_that_was_given_nothing_is_not_taken_for_hung() -> None:
    """The stand-in for a router gives all rollouts to the first server."""
    with (
        stubs(["--token-seconds", "0.1"], []) as two,
        engine_of(two, router=two[0].url) as engine,
    ):
        wanted = requests(20, 60)
        engine.submit(wanted)
        check(drain(engine, 20), wanted)
        assert engine._count == 20, "none was begun twice"
        assert [seat.state for seat in engine._pool.seats] == ["ready", "ready"], engine.health()


@pytest.mark.long
def test_behind_a_router_a_server_that_hangs_is_noticed() -> None:
    with (
        stubs(["--token-seconds", "0.1"], []) as two,
        engine_of(two, router=two[0].url) as engine,
    ):
        wanted = requests(6, 150)
        engine.submit(wanted)
        two[1].signal(signal.SIGSTOP)
        check(drain(engine, 6, 60.0), wanted)
        assert engine._count == 12, "whose they were is not known: all were begun anew"
        assert engine._pool.seats[1].state != "ready"


def test_a_rollout_beyond_its_time_ends_the_run_with_one_line() -> None:
    with (
        stubs(["--token-seconds", "0.5"]) as one,
        engine_of(one, request_timeout_s=1.0, silence_s=10.0) as engine,
    ):
        engine.submit(requests(3))
        began = time.monotonic()
        with pytest.raises(RunError, match=r"no answer within 1 s: raise rollout\.server\.request_timeout_s"):
            drain(engine, 3)
        assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "fault", ["not_json", "wrong_id", "missing_logprob", "nan", "too_long", "wrong_version", "error_500"]
)
def test_a_server_that_answers_garbage_is_left_and_another_does_its_rollouts(fault: str) -> None:
    with stubs(["--fault", fault], []) as two, engine_of(two) as engine:
        wanted = requests(20)
        engine.submit(wanted)
        check(drain(engine, 20), wanted)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("nan", "no finite number"),
        ("wrong_version", "answers with weights somebody-elses, which no sync vouches for"),
        ("error_500", "made-up failure"),
        ("error_400", "made-up refusal"),
    ],
)
def test_garbage_from_the_only_server_ends_the_run_with_one_line(fault: str, says: str) -> None:
    with stubs(["--fault", fault]) as one, engine_of(one) as engine:
        engine.submit(requests(3))
        with pytest.raises(RunError, match=says) as caught:
            drain(engine, 3)
        assert "\n" not in str(caught.value)


def test_a_server_that_came_back_has_no_weights_until_it_is_restored() -> None:
    restored: list[tuple[str, int]] = []

    def resync(address: ServerAddress, version: int, label: str) -> None:
        restored.append((address.url, version))
        name_weights(address, label)

    with stubs(["--token-seconds", "0.02"]) as one, engine_of(one, resync=resync) as engine:
        wanted = requests(8, 100)
        engine.submit(wanted)
        time.sleep(0.3)
        one[0].process.kill()
        one[0].process.wait()
        port = one[0].url.rpartition(":")[2]
        with stubs(["--port", port]):  # whoever runs it starts it again, with the weights it has on disk
            check(drain(engine, 8), wanted)
        assert restored == [(one[0].url, 3)]


def test_a_response_across_an_update_keeps_both_versions() -> None:
    with stubs(["--token-seconds", "0.01"]) as one, engine_of(one) as engine:
        engine.submit(requests(2, 400))
        time.sleep(0.2)
        sync(engine, 4)  # as in mode in_place: the stub names the version that it has at the end
        done = drain(engine, 2)
        assert {span.version for finished in done.values() for span in finished.versions} == {4}
        engine.submit([Request("later", (5, 6), 3)])
        assert drain(engine, 1)["later"].oldest_version == 4


def test_tokens_of_an_attempt_that_was_not_proved_are_sampled_again() -> None:
    """An update whose first way fails at its probe, after generation went on, and whose second way works."""
    with stubs(["--token-seconds", "0.01"]) as one, engine_of(one) as engine:
        wanted = requests(3, 40)
        engine.submit(wanted)
        time.sleep(0.1)
        engine.begin_update(4)
        (address,) = engine.servers()
        name_weights(address, "4.first")
        deadline = time.monotonic() + 10
        while len(engine._pool.seats[0].held) < 3:
            assert time.monotonic() < deadline, engine.health()
            time.sleep(0.05)
        name_weights(address, "4.second")
        engine.end_update([address], "4.second")
        check(drain(engine, 3), wanted, version=4)
        assert engine._count == 6  # each was begun anew
        assert engine.servers()[0].start == 1  # and the server, which is well, was not given up


def test_a_server_left_out_of_a_sync_gets_no_rollouts() -> None:
    with stubs([], []) as two, engine_of(two) as engine:
        sync(engine, 4, count=1)
        wanted = requests(30)
        engine.submit(wanted)
        assert not engine._pool.seats[1].jobs
        check(drain(engine, 30), wanted, version=4)
        assert engine.free_slots() <= 2048


def test_an_abort_comes_back_with_its_part_and_at_once() -> None:
    with stubs(["--token-seconds", "0.05", "--slots", "4"]) as one, engine_of(one) as engine:
        wanted = requests(8, 200)
        engine.submit(wanted)
        engine.abort(["r0"])  # overtakes its own request
        time.sleep(0.5)
        engine.abort([f"r{i}" for i in range(1, 8)])
        began = time.monotonic()
        done = drain(engine, 8)
        assert time.monotonic() - began < 3
        assert {finished.finish for finished in done.values()} == {"abort"}
        assert max(len(finished.tokens) for finished in done.values()) > 0
        engine.abort(["r0", "unknown"])
        assert engine.free_slots() == 4


def test_what_new_weights_abort_comes_back_with_the_version_of_its_part() -> None:
    with stubs(["--token-seconds", "0.01"]) as one, engine_of(one) as engine:
        engine.submit(requests(3, 2000))
        time.sleep(0.3)
        engine.begin_update(4)
        (address,) = engine.servers()
        loop, client = EventLoop(), SGLangClient(address.url)
        loop.run(client.pause_generation("abort"))  # as the weight sync does
        loop.run(client.set_weight_version("unfinished-4"))
        done = drain(engine, 3)
        loop.run(client.set_weight_version("4"))
        loop.run(client.continue_generation())
        loop.run(client.close())
        loop.close()
        engine.end_update([address])
        for finished in done.values():
            assert finished.finish == "abort" and finished.tokens
            assert [(s.version, s.start, s.end) for s in finished.versions] == [(3, 0, len(finished.tokens))]


def test_a_part_of_weights_that_nobody_vouches_for_is_left_out() -> None:
    with stubs(["--token-seconds", "0.05", "--fault", "wrong_version"]) as one, engine_of(one) as engine:
        engine.submit(requests(1, 200))
        time.sleep(0.3)
        engine.abort(["r0"])
        finished = drain(engine, 1)["r0"]
        assert (finished.finish, finished.tokens, finished.versions) == ("abort", (), ())


def test_a_request_beyond_the_context_is_refused() -> None:
    with stubs([]) as one, engine_of(one) as engine:
        with pytest.raises(UsageError, match="exceeds the servers' 999998 "):
            engine.submit([Request("a", (5,) * 10, 10**6)])
        engine.submit(requests(1, 1000))
        with pytest.raises(ValueError, match="already in flight"):
            engine.submit(requests(1))


def test_a_request_beyond_the_cache_is_refused_and_one_that_fills_it_is_whole() -> None:
    with stubs(["--kv-tokens", "100"], []) as two, engine_of(two) as engine:
        assert engine.positions == 98
        with pytest.raises(UsageError, match="prompt of 2 \\+ response of 97 tokens exceeds the servers' 98 "):
            engine.submit(requests(1, 97))
        wanted = requests(4, 96)
        engine.submit(wanted)
        check(drain(engine, 4), wanted)


def test_old_servers_are_refused() -> None:
    with stubs(["--version", "0.4.9"]) as one, pytest.raises(RunError, match=r"is SGLang 0\.4\.9: at least 0\.5\.15"):
        engine_of(one).__enter__()
