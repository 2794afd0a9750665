"""The whole hand-over of one version: hold, transfer, check, release, probe. Every rank calls `sync`.

A version is at a server when the ledger is whole, the server's checksums are the exported weights' (where it offers some
that can be compared), it carries the attempt's label, and its log-probs of a probe are the trainer's. A server that
falls short anywhere keeps another name (`unfinished-N`), is not handed to the engine, and gets no rollouts until a later
sync reaches it whole.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from lens_megatron.errors import RunError
from lens_megatron.mcore.hf_bridge import Holdings, agree_on_holdings
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.mcore.rendezvous import from_rank_zero, rank_zero_alive
from lens_megatron.mcore.routing import replay_routing
from lens_megatron.mcore.step import ShardedModel
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_schema import Generation, ServerInfo
from lens_megatron.rollout.weight_sync.checksums import ExpectedChecksums, can_be_compared, reported_by_rank
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.delivery import Delivery, Member, Transport
from lens_megatron.rollout.weight_sync.fleet import Fleet, SyncFailed, unfinished
from lens_megatron.rollout.weight_sync.ledger import Ledger, some
from lens_megatron.rollout.weight_sync.probe import Probe, bound_for
from lens_megatron.routed_experts import Routers, Routing

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_server import ServerAddress

T = TypeVar("T")
LEDGERS_KEPT = 20
GIVEN_UP_AFTER = 3  # failures of a transport in a row, where another one does it: each may have taken the time limit


class Servers(Protocol):
    """What the rollout driver offers: servers that answer, and the two ends of an update."""

    def servers(self) -> Sequence[ServerAddress]: ...

    def begin_update(self, version: int) -> None: ...

    def end_update(self, synced: Sequence[ServerAddress], label: str) -> None: ...

    def restart_servers(self, silent: Sequence[ServerAddress], reason: str) -> bool: ...


@dataclass(frozen=True)
class Synced:
    """Of one sync, on rank 0."""

    version: int
    transport: str
    bytes: int
    seconds: float
    transfer_seconds: float
    servers: int
    lost: int
    fell_back: bool
    probe_max: float  # largest difference of a probe token's log-prob, trainer to any server
    probe_mean: float
    changed: float  # share of the tensors that differ from the version before
    complaints: tuple[str, ...]  # what failed on the way, for people

    def metrics(self) -> dict[str, float]:
        return {
            "sync/version": float(self.version),
            "sync/bytes": float(self.bytes),
            "sync/seconds": self.seconds,
            "sync/gb_per_s": self.bytes / max(self.transfer_seconds, 1e-9) / 1e9,
            "sync/servers": float(self.servers),
            "sync/servers_lost": float(self.lost),
            "sync/fell_back": float(self.fell_back),
            "sync/probe_diff_max": self.probe_max,
            "sync/probe_diff": self.probe_mean,
            "sync/changed_tensors": self.changed,
        }


@dataclass
class _Attempt:
    """Rank 0's side of one attempt."""

    fleet: Fleet
    ledger: Ledger
    transport: Transport
    label: str = ""  # of the weights that it brings: no other attempt, of this run's lives or another's, has the same
    checksums: ExpectedChecksums | None = None
    began: float = 0.0
    transfer_seconds: float = 0.0
    answers: dict[str, Generation] = field(default_factory=dict)  # to the probe, by URL
    probe: tuple[float, float] = (0.0, 0.0)


class WeightSync:
    """Holds what lasts from sync to sync. `servers` and `folder` are rank 0's; `probe` is every rank's."""

    def __init__(
        self,
        config: SyncConfig,
        policy: ShardedModel,
        transports: Sequence[Transport],
        probe: Sequence[int],
        servers: Servers | None,
        folder: Path | None,
        silence_s: float = 600.0,
        tokens_per_microbatch: int = 16384,
        routers: Routers | None = None,
    ) -> None:
        """`routers`: the model's, where the servers tell which experts they took."""
        self.config, self.policy, self.transports = config, policy, list(transports)
        self.probe, self._servers, self._folder = list(probe), servers, folder
        self._silence_s, self._budget, self._routers = silence_s, tokens_per_microbatch, routers
        self._loop = EventLoop("weight-sync") if servers is not None else None
        self._attempt: _Attempt | None = None
        self._addresses: dict[str, ServerAddress] = {}
        self._asked: set[str] = set()  # in this sync, those included that were started again in it
        self._last: dict[str, str] = {}  # fingerprints of the version before
        self._failures_in_row = dict.fromkeys((transport.name for transport in transports), 0)

    def sync(self, version: int, before_probe: Callable[[], None] | None = None) -> Synced | None:
        """`version` at every server that is well; RunError on all ranks when there is none. The result is rank 0's.

        `before_probe`: when all is sent and before anything is generated, on every rank: where trainer and servers share
        GPUs, the trainer leaves them here (then there is no second transport: the weights are gone).
        """
        began = time.monotonic()
        self._asked = set()
        self._on_rank_zero(lambda: self._begin(version), "find the rollout servers")
        holdings = agree_on_holdings(self.policy.chunks, self.policy.spec)
        failures: list[str] = []
        reached = False
        for transport in self._worth_trying():
            problem = self._deliver(transport, version, holdings, before_probe)
            reached = problem is None
            self._failures_in_row[transport.name] = 0 if reached else self._failures_in_row[transport.name] + 1
            if reached:
                break
            failures.append(f"by {transport.name}: {problem}{self._given_up(transport)}")
        if not reached and len(self.transports) > 1:
            problem = self._on_rank_zero(lambda: self._start_again(version), "start the rollout servers again")
            if problem is None:
                problem = self._deliver(transport, version, holdings, before_probe)
            reached = problem is None
            if problem:
                failures.append(f"by {transport.name}, to servers started again: {problem}")
        return self._on_rank_zero(lambda: self._end(version, reached, failures, began), "end the weight sync")

    def _given_up(self, transport: Transport) -> str:
        times = self._failures_in_row[transport.name]
        if times < GIVEN_UP_AFTER or transport is self.transports[-1]:
            return ""
        return f" ({times} times in a row: {transport.name} is not tried again in this run)"

    def _worth_trying(self) -> list[Transport]:
        """The last one always is."""
        *first, last = self.transports
        return [*(one for one in first if self._failures_in_row[one.name] < GIVEN_UP_AFTER), last]

    def close(self) -> None:
        for transport in self.transports:
            transport.close(None if self._attempt is None else self._attempt.fleet)
        if self._attempt is not None:
            self._attempt.fleet.close()
        if self._loop is not None:
            self._loop.close()

    def _deliver(
        self, transport: Transport, version: int, holdings: Holdings, before_probe: Callable[[], None] | None
    ) -> str | None:
        """Why it failed, or None. The same on every rank."""
        held = self._on_rank_zero(lambda: self._hold(transport, version), "pause the rollout servers")
        if isinstance(held, str):
            return held
        members, compared = held
        delivery = Delivery(version, holdings, self.policy.spec, self.config, members)
        delivery.checksums = ExpectedChecksums() if compared else None
        attempt = self._attempt
        if attempt is not None:
            delivery.fleet, delivery.ledger, attempt.checksums = attempt.fleet, attempt.ledger, delivery.checksums
        problem: str | None = None
        try:
            with rank_zero_alive():  # the others have soon sent their parts, and wait for what the servers say
                transport.transfer(delivery)
        except SyncFailed as error:  # rank 0's
            problem = str(error)
        problem = self._on_rank_zero(lambda: problem or self._check(), "check the servers' weights")
        if problem is not None:
            return problem
        own_T = self.policy.score([torch.tensor(self.probe)], self._budget).logprobs[0]
        if before_probe is not None:
            before_probe()
        routing = self._on_rank_zero(self._release_and_probe, "probe the rollout servers")
        replayed = self._replayed(routing) if before_probe is None else []  # else the weights are not here any more
        return self._on_rank_zero(lambda: self._compare(own_T, replayed), "compare the rollout servers' log-probs")

    def _replayed(self, routing: Sequence[Routing]) -> list[Tensor]:
        """The probe's log-probs with the experts of each server, where they tell them."""
        probes = [torch.tensor(self.probe)] * len(routing)
        if not probes:
            return []
        with replay_routing(self.policy.chunks, probes, routing):
            return self.policy.score(probes, self._budget).logprobs

    def _on_rank_zero(self, work: Callable[[], T], what: str) -> T:
        return from_rank_zero(work, what, self._silence_s)

    # rank 0

    def _begin(self, version: int) -> None:
        assert self._servers is not None and self._loop is not None
        self._servers.begin_update(version)
        self._addresses = {address.url: address for address in self._servers.servers()}
        self._asked |= self._addresses.keys()
        if self._attempt is not None:
            self._attempt.fleet.close()
        fleet = Fleet.meet(self._addresses.values(), self._loop, self.config)
        self._attempt = _Attempt(fleet, self._empty_ledger(version, ""), self.transports[0])

    def _start_again(self, version: int) -> str | None:
        """Where no server took the fallback either: why it is not to be tried once more.

        A broadcast that failed leaves SGLang's GPUs waiting in it for ever: not the request, which is answered, but whatever
        comes to use the GPU next. Only a new start of the server ends that.
        """
        attempt = self._attempt
        assert attempt is not None and self._servers is not None
        silent = [self._addresses[url] for url in attempt.fleet.lost if url in attempt.fleet.silent]
        if not silent:
            return ""
        if not self._servers.restart_servers(silent, f"weights of version {version} did not reach it"):
            return "none can be (given by URL, or rollout.server.restarts is used up): restart them"
        self._begin(version)
        return None

    def _hold(self, transport: Transport, version: int) -> str | tuple[tuple[Member, ...], bool]:
        """Every live server paused and waiting for weights: who they are, and whether their checksums can be compared."""
        attempt = self._attempt
        assert attempt is not None
        fleet = attempt.fleet
        if attempt.ledger.transport:  # a transport before this one failed: those that answer get another chance
            fleet.look_again()
        staged = [url for url in fleet.live if fleet.infos[url].pp > 1]
        if staged and transport.name == "distributed":  # every stage would come to the group as its first one
            return f"{staged[0]} has pipeline stages, which SGLang does not tell apart in a group with the trainer"
        attempt.ledger, attempt.transport = self._empty_ledger(version, transport.name), transport
        attempt.label = f"{version}.{secrets.token_hex(4)}"
        try:
            fleet.hold(unfinished(version), by_disk=transport.name == "disk", scrambled=self._may_be_scrambled)
        except SyncFailed as error:
            return str(error)
        attempt.began = time.monotonic()
        compared = self.config.checksums and all(
            can_be_compared(self.policy.spec, fleet.infos[url]) for url in fleet.live
        )
        return tuple(Member(url, fleet.ranks(url), self._addresses[url].start) for url in fleet.live), compared

    def _may_be_scrambled(self, server: ServerInfo) -> bool:
        """Not where it pads with zeros that no update writes again."""
        return self.config.scramble and (server.device != "cpu" or can_be_compared(self.policy.spec, server))

    def _empty_ledger(self, version: int, transport: str) -> Ledger:
        return Ledger(version, transport, hf_shapes(self.policy.spec))

    def _check(self) -> str | None:
        """Before any server may use the version's name: the books, and what the servers themselves say they hold."""
        attempt = self._attempt
        assert attempt is not None
        attempt.transfer_seconds = time.monotonic() - attempt.began
        fleet, ledger = attempt.fleet, attempt.ledger
        if problems := ledger.problems():
            return "; ".join(problems)
        for url in fleet.live:
            if problems := ledger.problems([url]):
                fleet.refuse(url, "; ".join(problems))
        if ledger.transport != "disk":
            fleet.end_session()
        if attempt.checksums is not None:
            self._check_checksums(fleet, attempt.checksums)
        return None if fleet.live else "; ".join(fleet.lost.values())

    def _check_checksums(self, fleet: Fleet, checksums: ExpectedChecksums) -> None:
        for url, answer in fleet.checksums().items():
            for reported in reported_by_rank(answer):
                if wrong := checksums.differences(reported, self.policy.spec.tied):
                    fleet.refuse(url, f"{url} holds other weights than were exported: {some(wrong)}")

    def _release_and_probe(self) -> list[Routing]:
        """The experts that each server took for the probe, in the order of `answers`; none where they do not tell them."""
        attempt = self._attempt
        assert attempt is not None
        attempt.fleet.release(attempt.label)
        attempt.answers = attempt.fleet.probe(self.probe, attempt.label, self._routers)
        return [answer.routing for answer in attempt.answers.values() if answer.routing is not None]

    def _compare(self, own_T: Tensor, replayed: Sequence[Tensor]) -> str | None:
        """`replayed`: with each server's own experts, so that it is held to what a dense model's is."""
        attempt = self._attempt
        assert attempt is not None
        fleet, version = attempt.fleet, attempt.ledger.version
        fp32 = {entry.dtype for entry in attempt.ledger.entries.values()} == {"float32"}
        mixture = self.policy.spec.moe is not None

        def probe_of(logprobs_T: Tensor, ties: bool) -> Probe:
            bound = bound_for(self.config.probe_tolerance, fp32, ties)
            return Probe(tuple(self.probe), tuple(logprobs_T[1:].tolist()), bound)

        probe = probe_of(own_T, mixture)
        probes = [probe_of(logprobs_T, False) for logprobs_T in replayed] or [probe] * len(attempt.answers)
        apart: list[tuple[float, float]] = []
        for mine, (url, answer) in zip(probes, attempt.answers.items(), strict=True):
            if complaint := mine.complaint(answer.prompt_logprobs):
                fleet.refuse(url, f"{url}: {complaint}")
            else:
                apart.append(mine.differences(answer.prompt_logprobs))
        fleet.dismiss(f"refused-{version}")
        attempt.probe = (
            max((largest for largest, _ in apart), default=0.0),
            sum(mean for _, mean in apart) / max(1, len(apart)),
        )
        if not fleet.live:
            return "; ".join(fleet.lost.values())
        attempt.transport.proved(version, attempt.label, probe)
        return None

    def _end(self, version: int, reached: bool, failures: list[str], began: float) -> Synced | None:
        attempt = self._attempt
        assert attempt is not None and self._servers is not None
        fleet, ledger = attempt.fleet, attempt.ledger
        self._write(ledger, failures, fleet.lost)
        if not reached:
            raise RunError(
                f"weight sync: version {version} reached no rollout server whole, and nothing is sampled from part of it: "
                + "; then ".join(failures)
            )
        self._servers.end_update([self._addresses[url] for url in fleet.live], attempt.label)
        now = {name: entry.exported for name, entry in ledger.entries.items()}
        changed = sum(self._last.get(name) != value for name, value in now.items()) / len(now)
        self._last = now
        return Synced(
            version,
            ledger.transport,
            ledger.bytes,
            time.monotonic() - began,
            attempt.transfer_seconds,
            len(fleet.live),
            len(self._asked) - len(fleet.live),
            ledger.transport != self.transports[0].name,
            *attempt.probe,
            changed,
            (*failures, *fleet.lost.values()),
        )

    def _write(self, ledger: Ledger, failures: Sequence[str], lost: Mapping[str, str]) -> None:
        """The ledger, into the run folder, whether it is whole or not."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        tree = {**ledger.tree(), "failed": list(failures), "lost": dict(lost)}
        (self._folder / f"version_{ledger.version:06d}.json").write_text(json.dumps(tree, indent=0) + "\n")
        for old in sorted(self._folder.glob("version_*.json"))[:-LEDGERS_KEPT]:
            old.unlink()
