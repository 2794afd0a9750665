"""Weights broadcast by the trainer to the servers' ranks: one group for each pipeline stage, which sends what it holds.

All servers take all buckets in one order, told by rank 0 in requests: two servers that took two stages' buckets in
different orders would wait for each other. A stage's leader gathers its next bucket while the one before is on its way,
by itself or by another stage. Rank 0 and the leaders talk through the trainer's store:

    port/STAGE   leader -> rank 0    where the stage's group meets: its name, its port, an address for each server
    go/BUCKET    rank 0 -> leader    the servers are told of this bucket
    stop         anyone -> all       something failed, and why
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from functools import partial

import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore.hf_bridge import exhaust
from lens_megatron.mcore.rendezvous import from_rank_zero
from lens_megatron.mcore.runtime import device
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.weight_sync.buckets import Bucket, Buffers, plan_buckets
from lens_megatron.rollout.weight_sync.delivery import Delivery, Member, Noted, bucket_numbers, fingerprints
from lens_megatron.rollout.weight_sync.fleet import Fleet, SyncFailed
from lens_megatron.rollout.weight_sync.ledger import Entry
from lens_megatron.rollout.weight_sync.meeting import Place, agree_on_places, own_address, refuse_what_cannot_meet
from lens_megatron.rollout.weight_sync.probe import Probe
from lens_megatron.rollout.weight_sync.process_group import GroupWithServers, Stopped, advice

LOOK_SECONDS = 1e-3
_transfers = 0
# what a leader reports: its entries, fingerprints of what it sent, checksums, and what went wrong
_Report = tuple[list[Entry], dict[str, str], dict[str, str], str]


class Board:
    """Keys of one transfer in the trainer's store."""

    def __init__(self, timeout_s: float) -> None:
        """Every rank makes as many: the number keeps the keys of two transfers apart."""
        global _transfers
        _transfers += 1
        self._store = dist.distributed_c10d._get_default_store()
        self._prefix = f"lens/sync/{_transfers}/"
        self._limit_s = timeout_s

    def put(self, key: str, value: str = "1") -> None:
        self._store.set(self._prefix + key, value)

    def has(self, key: str) -> bool:
        return bool(self._store.check([self._prefix + key]))

    def read(self, key: str, patient: bool = False) -> str:
        """Waits for it by looking: a wait of one thread would keep the store from the others of this process. `patient`: as
        long as nobody stops, for the turns of other stages may take any time."""
        deadline = time.monotonic() + self._limit_s
        while not self.has(key):
            if key != "stop" and self.stopped():
                raise Stopped
            if not patient and time.monotonic() > deadline:
                raise SyncFailed(f"{key} was not announced within {self._limit_s:g} s")
            time.sleep(LOOK_SECONDS)
        return str(self._store.get(self._prefix + key).decode())

    def stop(self, reason: str) -> None:
        if not self.has("stop"):
            self.put("stop", reason)

    def stopped(self) -> bool:
        return self.has("stop")


class DistributedTransport:
    name = "distributed"

    def __init__(self, backend: str, address: str | None) -> None:
        """`address`: of the leaders' machine as the servers see it, or an interface of each of their machines; None finds
        the way to each server."""
        self._backend, self._address = backend, address
        self._places: list[Place] = []  # of all ranks
        self._members: tuple[Member, ...] = ()
        self._group: GroupWithServers | None = None  # of this rank's stage, where it leads
        self._names: list[str] = []  # of the groups that servers may be in; rank 0's
        self._kept: list[Tensor] = []

    def transfer(self, delivery: Delivery) -> None:
        rank, holdings = dist.get_rank(), delivery.holdings
        board = Board(delivery.config.timeout_s)
        stage = holdings.stages[rank]
        leader = holdings.leader_of(stage)
        stages = max(holdings.stages) + 1
        self._places = self._places or agree_on_places(self._address)
        leaders = [self._places[holdings.leader_of(s)] for s in range(stages)]
        refuse_what_cannot_meet(leaders, self._address, [member.url for member in delivery.members])
        buckets = plan_buckets([delivery.described(s) for s in range(stages)], delivery.most_bytes)
        tensors = delivery.tensors(stage, leader, device())
        telling: threading.Thread | None = None
        report: _Report = ([], {}, {}, "")
        if rank == 0:
            telling = threading.Thread(target=self._tell_servers, args=(delivery, buckets, stages, board), daemon=True)
            telling.start()
        if rank == leader:
            mine = [bucket for bucket in buckets if bucket.stage == stage]
            report = self._lead(delivery, mine, tensors, stage, board)
        exhaust(tensors)
        # on the store: who has sent its part would wait in _conclude's collective for as long as the servers take
        from_rank_zero(lambda: None if telling is None else telling.join(), "tell the servers of their weights")
        self._conclude(delivery, report, board)

    # a leader

    def _lead(
        self, delivery: Delivery, buckets: list[Bucket], tensors: Iterator[tuple[str, Tensor]], stage: int, board: Board
    ) -> _Report:
        noted = Noted([], delivery.checksums)
        sent: dict[str, str] = {}
        problem = ""
        try:
            self._meet(delivery, stage, board)
            self._send(buckets, noted.passing(tensors, bucket_numbers(buckets)), sent, board, delivery)
        except Stopped:
            problem = "stopped"
            self._abandon()
        except Exception as error:  # whatever torch raises of a broken group: told to rank 0, never left to hang
            problem = f"rank {dist.get_rank()}: {type(error).__name__}: {str(error).splitlines()[0]}{advice(error)}"
            board.stop(problem)
            self._abandon()
        return noted.entries, sent, noted.checksums.expected() if noted.checksums else {}, problem

    def _abandon(self) -> None:
        """At once, before the rest of the model is gathered: its connections are what the servers still wait for."""
        if self._group is not None:
            self._group.abandon()
        self._group = None
        self._kept = []  # somebody may still be sent what is in them

    def _meet(self, delivery: Delivery, stage: int, board: Board) -> None:
        if delivery.members == self._members:
            return
        self._abandon()
        size = 1 + sum(member.ranks for member in delivery.members)
        # apart from the groups of other runs, and of this rank's earlier ones, at the same servers
        name = f"lens-{secrets.token_hex(4)}-{stage}"
        self._group = GroupWithServers(name, size, self._backend, delivery.config.timeout_s)
        place = self._places[dist.get_rank()]
        towards = {member.url: own_address(place, self._address, member.url) for member in delivery.members}
        board.put(f"port/{stage}", json.dumps([name, self._group.port, towards]))
        self._group.join(board.stopped)

    def _send(
        self,
        buckets: list[Bucket],
        tensors: Iterator[tuple[str, Tensor]],
        sent: dict[str, str],
        board: Board,
        delivery: Delivery,
    ) -> None:
        assert self._group is not None
        buffers = Buffers(buckets, device(), self._kept)
        under_way: tuple[Bucket, Tensor, object] | None = None
        for bucket in buckets:
            buffer_B = buffers.fill(bucket, tensors)  # while the one before is on its way
            arrived = under_way
            if arrived is not None:
                self._group.wait(arrived[2], board.stopped)
            board.read(f"go/{bucket.number}", patient=True)
            under_way = bucket, buffer_B, self._group.broadcast(buffer_B, board.stopped)
            if arrived is not None:
                sent.update(fingerprints(*arrived[:2]))
        if under_way is not None:
            self._group.wait(under_way[2], board.stopped)
            sent.update(fingerprints(*under_way[:2]))

    # rank 0

    def _tell_servers(self, delivery: Delivery, buckets: list[Bucket], stages: int, board: Board) -> None:
        """In a thread of its own: rank 0 leads a stage as well."""
        fleet, ledger = delivery.fleet, delivery.ledger
        assert fleet is not None and ledger is not None
        try:
            if delivery.members != self._members:
                self._dismiss(fleet)
                for stage in range(stages):
                    self._invite(delivery, fleet, board.read(f"port/{stage}"))
            for bucket in buckets:
                group = self._names[bucket.stage]
                asked = fleet.start(partial(_receive, bucket=bucket, group=group, unfinished=delivery.unfinished))
                board.put(f"go/{bucket.number}")
                for url in fleet.collect(asked, all_or_none=True):
                    ledger.acknowledge(url, bucket.number)
        except Stopped:
            pass
        except Exception as error:  # the thread's only way to tell: a leader waits for it
            board.stop(str(error).splitlines()[0] or type(error).__name__)

    def _dismiss(self, fleet: Fleet) -> None:
        """From the groups before, which the leaders leave at the same time."""
        fleet.leave_groups(self._names)
        self._names = []

    def _invite(self, delivery: Delivery, fleet: Fleet, meeting: str) -> None:
        name, port, towards = json.loads(meeting)
        self._names.append(name)
        offsets, offset = {}, 1
        for member in delivery.members:
            offsets[member.url], offset = offset, offset + member.ranks
        asked = fleet.start(
            lambda server: server.init_weights_update_group(
                towards[server.url],
                port,
                offsets[server.url],
                offset,
                name,
                self._backend,  # type: ignore[arg-type]
            )
        )
        fleet.collect(asked, all_or_none=True)

    def _conclude(self, delivery: Delivery, report: _Report, board: Board) -> None:
        """The leaders' books to rank 0; groups that something failed in are not used again."""
        reports: list[_Report] = [report] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        reason = board.read("stop") if board.stopped() else ""
        self._members = () if reason else delivery.members
        if reason:
            self._abandon()
        if delivery.ledger is None:
            return
        for entries, sent, checksums, _ in reports:
            delivery.ledger.add(entries)
            delivery.ledger.sent(sent)
            if delivery.checksums is not None:
                delivery.checksums.add(checksums)
        if reason:
            raise SyncFailed(reason)

    def proved(self, version: int, label: str, probe: Probe) -> None:
        pass

    def close(self, fleet: Fleet | None) -> None:
        self._abandon()
        if fleet is not None:
            self._dismiss(fleet)


async def _receive(server: SGLangClient, bucket: Bucket, group: str, unfinished: str) -> None:
    await server.update_weights_from_distributed(
        [slot.name for slot in bucket.slots],
        [slot.dtype_name for slot in bucket.slots],
        [slot.shape for slot in bucket.slots],
        group,
        unfinished,
        "flattened_bucket",
    )
