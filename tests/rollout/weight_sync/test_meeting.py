"""Where groups with the servers meet, with made-up machines: which address each leader announces, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from lens_megatron.errors import UsageError
from lens_megatron.rollout.weight_sync import distributed, meeting
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.delivery import Member
from lens_megatron.rollout.weight_sync.meeting import Place

HERE, REMOTE, ELSEWHERE = "http://127.0.0.1:1", "http://10.0.0.7:1", "http://192.168.0.7:1"
INTERFACES = {"ib0": {"n1": "10.1.0.1", "n2": "10.1.0.2"}, "eth9": {"n1": "10.9.0.1"}}


def places(monkeypatch: pytest.MonkeyPatch, configured: str | None, *hosts: str) -> list[Place]:
    """As the ranks agree on them, one on each of the hosts."""
    found = []
    for host in hosts:
        monkeypatch.setattr(meeting.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(meeting, "interface_address", lambda name, host=host: INTERFACES.get(name, {}).get(host))
        monkeypatch.setattr(meeting, "_resolves", lambda name: name[0].isdigit())
        monkeypatch.setattr(meeting.dist, "get_world_size", lambda: 1)
        monkeypatch.setattr(meeting.dist, "all_gather_object", lambda into, mine: into.__setitem__(0, mine))
        found += meeting.agree_on_places(configured)
    return found


def announced(monkeypatch: pytest.MonkeyPatch, configured: str | None, hosts: list[str], urls: list[str]) -> list[Any]:
    """By the leader of each stage, one rank a stage."""
    said: list[Any] = []
    group = SimpleNamespace(port=7, join=lambda _: None)
    monkeypatch.setattr(distributed, "GroupWithServers", lambda *_: group)
    where = places(monkeypatch, configured, *hosts)
    board: Any = SimpleNamespace(put=lambda _, words: said.append(json.loads(words)[2]), stopped=lambda: False)
    members = tuple(Member(url, 1, 1) for url in urls)
    for rank in range(len(hosts)):
        transport: Any = distributed.DistributedTransport("gloo", configured)
        transport._places = where
        monkeypatch.setattr(distributed.dist, "get_rank", lambda rank=rank: rank)
        transport._meet(SimpleNamespace(members=members, config=SyncConfig()), rank, board)
    return said


def test_each_server_is_told_the_address_on_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"10.0.0.7": "10.0.0.1", "192.168.0.7": "192.168.0.1"}

    class Probe:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def connect(self, to: tuple[str, int]) -> None:
            self.to = to[0]

        def getsockname(self) -> tuple[str, int]:
            return ways[self.to], 5

    monkeypatch.setattr(meeting.socket, "socket", Probe)
    (said,) = announced(monkeypatch, None, ["n1"], [HERE, REMOTE, ELSEWHERE])
    assert said == {HERE: "127.0.0.1", REMOTE: "10.0.0.1", ELSEWHERE: "192.168.0.1"}


def test_an_interface_is_each_leaders_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said = announced(monkeypatch, "ib0", ["n1", "n2"], [HERE, REMOTE])
    assert said == [{HERE: "10.1.0.1", REMOTE: "10.1.0.1"}, {HERE: "10.1.0.2", REMOTE: "10.1.0.2"}]


def test_an_address_is_announced_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = announced(monkeypatch, "n1.cluster", ["n1"], [REMOTE])
    assert said == {REMOTE: "n1.cluster"}


@pytest.mark.parametrize(
    "configured, hosts, urls, says",
    [
        (None, ["n1", "n1"], [HERE], None),
        (None, ["n1", "n2"], [REMOTE], None),
        (None, ["n1", "n2"], [REMOTE, HERE], "would look for n2, which leads a pipeline stage, on n1"),
        (None, ["n1", "n2"], ["http://localhost:1"], "would look for n2"),
        ("10.0.0.1", ["n1", "n1"], [REMOTE], None),
        ("10.0.0.1", ["n1", "n1", "n2"], [REMOTE], "are led from n1 and n2, and n1 has no network interface 10.0.0.1"),
        ("ib0", ["n1", "n2"], [HERE], None),
        ("ib7", ["n1"], [REMOTE], "address ib7: neither a network interface of n1 nor"),
        ("eth9", ["n1", "n2"], [REMOTE], "n2 has no network interface eth9"),
    ],
)
def test_what_cannot_meet_is_refused(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, hosts: list[str], urls: list[str], says: str | None
) -> None:
    leaders = places(monkeypatch, configured, *hosts)
    if says is None:
        meeting.refuse_what_cannot_meet(leaders, configured, urls)
        return
    with pytest.raises(UsageError, match=says) as refused:
        meeting.refuse_what_cannot_meet(leaders, configured, urls)
    assert "\n" not in str(refused.value)


def test_only_leaders_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of another machine that lead nothing do not speak to servers; those that do are refused on every rank."""
    where = places(monkeypatch, None, "n1", "n2", "n2")
    monkeypatch.setattr(distributed, "Board", lambda _: None)
    monkeypatch.setattr(distributed, "agree_on_places", lambda _: where)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)

    def transfer(stages: list[int]) -> None:
        leaders = SimpleNamespace(stages=stages, leader_of=stages.index)
        members = (Member(HERE, 1, 1),)
        delivery: Any = SimpleNamespace(holdings=leaders, members=members, config=SyncConfig(), described=_reached)
        delivery.most_bytes = 1
        distributed.DistributedTransport("gloo", None).transfer(delivery)

    with pytest.raises(Reached):
        transfer([0, 0, 0])
    with pytest.raises(UsageError, match="n2, which leads"):
        transfer([0, 0, 1])


class Reached(Exception):
    pass


def _reached(_: int) -> Any:
    raise Reached


def test_interfaces_of_this_machine() -> None:
    assert meeting.interface_address("lo") == "127.0.0.1"
    for name in ("none0", "10.0.0.1", "a" * 300):
        assert meeting.interface_address(name) is None
