"""Taking turns: the order of what is let go and taken, and that nothing is resumed which was not released."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_client import SGLangClient, Unreachable
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_seat import Seat, seats
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync import handover
from lens_megatron.rollout.weight_sync.handover import Handover, ServerMemory
from tests.rollout.test_sglang_engine import drain, requests, sync
from tests.rollout.test_sglang_server import launched, server_of
from tests.rollout.test_sglang_updates import until


class Asked(ServerMemory):
    """Writes down instead of asking; a server dies of a resume that it cannot make, like the real one."""

    def __init__(self, log: list[str]) -> None:
        self._released: dict[tuple[str, int], set[str]] = {}
        self.log, self.gone = log, dict[tuple[str, int], set[str]]()

    def _ask(self, server: ServerAddress, verb: Callable[[Any], Any]) -> None:
        gone = self.gone.setdefault((server.url, server.start), set())

        class Client:
            def flush_cache(client, drains: bool) -> None:
                assert "kv_cache" not in gone

            def release_memory_occupation(client, tags: list[str]) -> None:
                assert not gone & set(tags)
                gone.update(tags)
                self.log.append(f"{server.name} releases {' '.join(tags)}")

            def resume_memory_occupation(client, tags: list[str]) -> None:
                assert set(tags) <= gone, "the server dies"
                gone.difference_update(tags)
                self.log.append(f"{server.name} resumes {' '.join(tags)}")

        verb(Client())


class Engine:
    """Its servers; those in `down` are started as soon as they may be."""

    def __init__(self, log: list[str], servers: list[ServerAddress], down: list[ServerAddress]) -> None:
        self.log, self.there, self.down = log, servers, down

    def servers(self) -> list[ServerAddress]:
        return self.there

    def trainers_turn(self) -> list[ServerAddress]:
        return self.there

    def engines_turn(self) -> list[ServerAddress]:
        for server in self.down:
            self.log.append(f"{server.name} starts")
        self.there += self.down
        self.down = []
        return self.there


class Residence:
    def __init__(self, log: list[str]) -> None:
        self.on_device, self.log = True, log

    def release(self) -> None:
        self.on_device = False
        self.log.append("trainer leaves")

    def restore(self) -> None:
        if not self.on_device:
            self.log.append("trainer returns")
        self.on_device = True


def made(
    log: list[str], servers: list[ServerAddress], budget: float = 1.0, down: Sequence[ServerAddress] = ()
) -> Handover:
    def on_every_rank(does: Callable[[], None]) -> None:
        does()
        log.append("every rank has")

    residence: Any = Residence(log)
    return Handover(
        residence, lambda work, what: work(), on_every_rank, Engine(log, servers, list(down)), Asked(log), budget
    )


def test_a_step_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(handover, "give_back_cache", lambda: log.append("trainer gives back its cache"))
    turns = made(log, [ServerAddress("s", "http://s", None, 1)])
    turns.to_trainer(keep_engine_weights=False)  # the servers are up: the trainer is built
    turns.before_sync()
    turns.to_engine()
    turns.to_trainer(keep_engine_weights=True)  # a filter wants more prompts scored
    turns.to_engine()
    turns.to_engine()
    turns.to_trainer(keep_engine_weights=False)
    turns.before_sync()
    assert log == [
        "s releases kv_cache weights",
        "trainer gives back its cache",
        "every rank has",
        "s resumes weights",
        "trainer leaves",
        "every rank has",
        "s resumes kv_cache",
        "s releases kv_cache",
        "trainer returns",
        "trainer leaves",
        "every rank has",
        "s resumes kv_cache",
        "s releases kv_cache weights",
        "trainer returns",
        "trainer gives back its cache",
        "every rank has",
        "s resumes weights",
    ]


def test_a_restarted_server_holds_everything_again() -> None:
    log: list[str] = []
    servers = [ServerAddress("s", "http://s", None, 1)]
    turns = made(log, servers)
    turns.to_trainer(keep_engine_weights=False)
    servers[0] = ServerAddress("s", "http://s", None, 2)  # died, and was started again
    log.clear()
    turns.before_sync()  # nothing to resume: that would kill it
    turns.to_engine()
    assert log == ["every rank has", "trainer leaves", "every rank has"]


def test_when_all_died_in_the_trainers_turn_it_leaves_for_them_to_start() -> None:
    log: list[str] = []
    turns = made(log, [], down=[ServerAddress("s", "http://s", None, 2)])
    turns.before_sync()
    assert log == [
        "trainer leaves",
        "every rank has",
        "s starts",
        "s releases kv_cache weights",
        "trainer returns",
        "every rank has",
        "s resumes weights",
    ]


def test_a_server_that_does_not_answer_keeps_no_other_from_its_memory() -> None:
    log: list[str] = []
    one, two = (ServerAddress(name, f"http://{name}", None, 1) for name in ("one", "two"))
    turns = made(log, [one, two])
    turns.to_trainer(keep_engine_weights=True)
    memory: Any = turns._memory
    asks = memory._ask

    def refuses(server: ServerAddress, verb: Callable[[Any], Any]) -> None:
        if server is one:
            raise Unreachable("one died, which nobody has noticed yet")
        asks(server, verb)

    memory._ask = refuses
    turns.to_engine()
    assert log[-1] == "two resumes kv_cache"
    with pytest.raises(Unreachable):  # what may still hold memory is another matter
        turns.to_trainer(keep_engine_weights=True)


def test_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "residual_bytes", lambda: 3 * 2**30)
    log: list[str] = []
    turns = made(log, [ServerAddress("s", "http://s", None, 1)], budget=2.0)
    with pytest.raises(RunError, match=r"keeps 3.0 GiB .* over memory.residual_gib 2"):
        turns.to_engine()
    assert log == ["trainer leaves"]  # the servers get no cache on top of it
    assert turns.residual_gib == 3.0


def test_on_shared_gpus_no_server_starts_in_the_trainers_turn(tmp_path: Path) -> None:
    """One that died while it sampled is waited for, and has released its memory before the trainer takes its own."""
    config = launched(restarts=4, env={"TOKEN_SECONDS": "0.02", "START_SECONDS": "3"})
    engine = SGLangEngine(seats(config, 2, "m", tmp_path, 0, {}, 0), config)
    victim, other = engine._pool.seats
    returned: list[int] = []

    class Residence:
        on_device = False

        def release(self) -> None:
            self.on_device = False

        def restore(self) -> None:
            assert [asyncio.run(_released(seat)) for seat in (victim, other)] == [["kv_cache", "weights"]] * 2
            returned.append(victim.starts)
            self.on_device = True

    residence: Any = Residence()
    turns = Handover(residence, lambda work, _: work(), lambda leave: leave(), engine, ServerMemory(20.0), 1.0)
    try:
        sync(engine, 3)
        engine.submit(requests(6, 30))
        until(lambda: len(victim.jobs) == 3)
        server_of(engine).kill()
        drain(engine, 6)  # by the other one
        assert victim.state == "starting"
        turns.to_trainer(keep_engine_weights=False)
        assert returned == [2]

        server_of(engine).kill()
        until(lambda: victim.state == "down", 20.0)
        time.sleep(0.5)
        assert victim.process is not None and victim.process.starts == victim.starts == 2
        turns.to_engine()
        turns.to_trainer(keep_engine_weights=False)
        assert returned == [2, 3]

        for number in range(2):
            server_of(engine, number).kill()
        until(lambda: victim.state == other.state == "down", 20.0)
        turns.before_sync()  # there is none to take weights: they are let start first
        assert returned == [2, 3, 4] and asyncio.run(_released(victim)) == ["kv_cache"]
    finally:
        engine.close()


async def _released(seat: Seat) -> list[str]:
    client = SGLangClient(seat.client.url, seat.api_key)
    try:
        return list((await client.server_info()).raw["stub_released"])
    finally:
        await client.close()
