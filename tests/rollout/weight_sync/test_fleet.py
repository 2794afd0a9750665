"""Servers of a sync, asked together: what one of them does wrong is its own failure. Against stub servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_schema import IN_PLACE_ARGUMENTS
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync import distributed
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.delivery import Member
from lens_megatron.rollout.weight_sync.fleet import Fleet
from lens_megatron.rollout.weight_sync.meeting import Place
from tests.rollout.test_sglang_client import stub_server


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


IN_PLACE = json.dumps(IN_PLACE_ARGUMENTS)


def meet(loop: EventLoop, *urls: str, **config: Any) -> Fleet:
    return Fleet.meet([ServerAddress("s", url, None, 1) for url in urls], loop, SyncConfig(timeout_s=10.0, **config))


def test_a_probe_that_is_no_number_loses_that_server_alone(loop: EventLoop) -> None:
    with stub_server("--fault", "nan") as bad, stub_server() as good:
        fleet = meet(loop, bad, good)
        assert list(fleet.probe([5, 6, 7], "default", None)) == [good]
        assert "no finite number" in fleet.lost[bad]
        fleet.close()


def test_an_answer_without_success_loses_that_server_alone(loop: EventLoop) -> None:
    with stub_server("--fault", "no_success") as bad, stub_server() as good:
        fleet = meet(loop, bad, good)
        fleet.hold("unfinished-1", by_disk=False, scrambled=lambda _: False)
        assert fleet.live == [good]
        assert "200 without success" in fleet.lost[bad]
        fleet.dismiss("refused-1")
        fleet.close()


def test_in_place_what_is_idle_is_flushed_and_scrambled_and_what_runs_is_neither(loop: EventLoop) -> None:
    with stub_server("--arguments", IN_PLACE, "--token-seconds", "0.05") as busy, stub_server() as unfit:
        fleet = meet(loop, busy, unfit, in_flight="in_place")
        server = fleet.clients[busy]

        def scrambled() -> int:
            return int(loop.run(server.server_info()).raw["stub_scrambled"])

        rollout = loop.start(server.generate("r", (5, 6), 60))
        while loop.run(server.load()).used_tokens < 2:
            time.sleep(0.01)
        fleet.hold("unfinished-1", by_disk=True, scrambled=lambda _: True)
        assert fleet.live == [busy] and "disable_radix_cache" in fleet.lost[unfit]
        assert scrambled() == 0
        fleet.release("1")
        answer = rollout.result(20.0)
        assert answer.finish == "length" and [label for label, _, _ in answer.versions] == ["default", "1"]
        fleet.hold("unfinished-2", by_disk=True, scrambled=lambda _: True)
        assert scrambled() == 1
        fleet.close()


def test_a_session_left_open_is_ended_before_the_disk_is_read(loop: EventLoop) -> None:
    with stub_server() as url:
        fleet = meet(loop, url)
        fleet.hold("unfinished-1", by_disk=False, scrambled=lambda _: False)  # and then its transport fails
        for _ in range(2):  # the second time there is none to end
            fleet.hold("unfinished-1", by_disk=True, scrambled=lambda _: False)
            assert fleet.live == [url], fleet.lost
        loop.run(fleet.clients[url].begin_weight_update())  # refused while one is open
        fleet.close()


def test_servers_leave_the_groups_that_are_not_used_any_more(loop: EventLoop) -> None:
    transport = distributed.DistributedTransport("gloo", "127.0.0.1")
    with stub_server() as first, stub_server() as second:
        fleet = meet(loop, first, second)

        def told(members: tuple[Member, ...], *names: str) -> None:
            """A transfer of no buckets, of one stage a name."""
            towards = dict.fromkeys((first, second), "127.0.0.1")
            board: Any = SimpleNamespace(
                read=lambda key: json.dumps([names[int(key.removeprefix("port/"))], 1, towards])
            )
            delivery: Any = SimpleNamespace(members=members, fleet=fleet, ledger=object())
            transport._tell_servers(delivery, [], len(names), board)
            transport._members = members  # as _conclude does of a transfer that went well

        def groups() -> list[list[str]]:
            infos = [loop.run(client.server_info()) for client in fleet.clients.values()]
            return [info.raw["stub_groups"] for info in infos]

        members = tuple(Member(url, 1, 1) for url in (first, second))
        told(members, "a0", "a1")
        told(members, "a0", "a1")
        assert groups() == [["a0", "a1"]] * 2
        told((members[0], Member(second, 1, 2)), "b0", "b1")  # it was started again
        assert groups() == [["b0", "b1"]] * 2
        transport._members = ()  # as _conclude does of one that failed
        told(members, "c0", "c1")
        assert groups() == [["c0", "c1"]] * 2
        transport.close(fleet)
        assert groups() == [[], []] and not fleet.lost
        fleet.close()


def test_a_server_restarted_at_its_address_gets_a_new_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Group:
        port = 1

        def __init__(self, *_: Any) -> None:
            made.append(self)

        def join(self, stopped: Any) -> None: ...

        def abandon(self) -> None:
            made.append("abandoned")

    monkeypatch.setattr(distributed, "GroupWithServers", Group)
    transport = distributed.DistributedTransport("gloo", "127.0.0.1")
    transport._places = [Place("here", None)]
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    board: Any = SimpleNamespace(put=lambda *_: None, stopped=lambda: False)

    def meet(start: int) -> None:
        members = (Member("http://s", 1, start),)
        delivery: Any = SimpleNamespace(members=members, config=SyncConfig())
        transport._meet(delivery, 0, board)
        transport._members = members  # as _conclude does of a transfer that went well

    meet(1)
    meet(1)
    assert len(made) == 1
    meet(2)
    assert made[1] == "abandoned" and len(made) == 3


@pytest.mark.parametrize("fails_with", [RuntimeError("NCCL: remote process exited"), distributed.Stopped()])
def test_a_broken_group_is_left_before_the_rest_is_gathered(
    monkeypatch: pytest.MonkeyPatch, fails_with: Exception
) -> None:
    """Gathering takes as long as the rest of the model does, and so long the servers would wait in it."""
    order: list[str] = []

    class Group:
        port = 1

        def __init__(self, *_: Any) -> None: ...

        def join(self, stopped: Any) -> None:
            raise fails_with

        def abandon(self) -> None:
            order.append("abandoned")

    monkeypatch.setattr(distributed, "GroupWithServers", Group)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "Board", lambda _: SimpleNamespace(put=lambda *_: None, **_stopped()))
    monkeypatch.setattr(distributed, "exhaust", lambda _: order.append("gathered"))
    monkeypatch.setattr(distributed, "plan_buckets", lambda *_: [])
    monkeypatch.setattr(distributed, "from_rank_zero", lambda *_: None)
    monkeypatch.setattr(distributed, "agree_on_places", lambda _: [Place("here", None)])
    transport: Any = distributed.DistributedTransport("gloo", "127.0.0.1")
    monkeypatch.setattr(transport, "_tell_servers", lambda *_: None)
    monkeypatch.setattr(transport, "_conclude", lambda *_: order.append("concluded"))
    transport.transfer(_delivery(Member("http://s", 1, 1)))
    assert order == ["abandoned", "gathered", "concluded"]


def _stopped() -> dict[str, Any]:
    return {"stop": lambda _: None, "stopped": lambda: False, "read": lambda _: ""}


def _delivery(*members: Member) -> Any:
    """Of one rank's model."""
    holdings = SimpleNamespace(stages=[0], leader_of=lambda _: 0)
    return SimpleNamespace(
        holdings=holdings,
        config=SyncConfig(),
        members=members,
        checksums=None,
        most_bytes=1,
        described=lambda _: [],
        tensors=lambda *_: iter([]),
    )
