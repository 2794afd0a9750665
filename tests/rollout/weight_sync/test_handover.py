"""Taking turns: the order of what is let go and taken, and that nothing is resumed which was not released."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync import handover
from lens_megatron.rollout.weight_sync.handover import Handover, ServerMemory


class Asked(ServerMemory):
    """Writes down instead of asking; a server dies of a resume that it cannot make, like the real one."""

    def __init__(self, log: list[str]) -> None:
        self._released: dict[tuple[str, int], set[str]] = {}
        self.log, self.gone = log, dict[tuple[str, int], set[str]]()

    def _ask(self, server: ServerAddress, verb: Callable[[Any], Any]) -> None:
        gone = self.gone.setdefault((server.url, server.start), set())

        class Client:
            def flush_cache(client) -> None:
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


def made(log: list[str], servers: list[ServerAddress], budget: float = 1.0) -> Handover:
    def on_every_rank(leave: Callable[[], None]) -> None:
        leave()
        log.append("the last rank has left")

    residence: Any = Residence(log)
    return Handover(residence, lambda work, what: work(), on_every_rank, lambda: servers, Asked(log), budget)


def test_a_step_in_order() -> None:
    log: list[str] = []
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
        "s resumes weights",
        "trainer leaves",
        "the last rank has left",
        "s resumes kv_cache",
        "s releases kv_cache",
        "trainer returns",
        "trainer leaves",
        "the last rank has left",
        "s resumes kv_cache",
        "s releases kv_cache weights",
        "trainer returns",
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
    assert log == ["trainer leaves", "the last rank has left"]


def test_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "residual_bytes", lambda: 3 * 2**30)
    log: list[str] = []
    turns = made(log, [ServerAddress("s", "http://s", None, 1)], budget=2.0)
    with pytest.raises(RunError, match=r"keeps 3.0 GiB .* over memory.residual_gib 2"):
        turns.to_engine()
    assert log == ["trainer leaves"]  # the servers get no cache on top of it
    assert turns.residual_gib == 3.0
