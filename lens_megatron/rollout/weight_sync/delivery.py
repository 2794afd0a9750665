"""One attempt to bring one version to the servers, and what every transport answers to.

Every rank calls `transfer`; tensors are gathered from the ranks that hold them while it runs. Rank 0 alone speaks to the
servers and keeps the ledger. Nothing but the servers may fail half-way: a rank that stopped gathering would leave others
waiting in theirs, so whatever happens the rest is gathered, and thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lens_megatron.fingerprints import fingerprint
from lens_megatron.mcore.hf_bridge import Holdings, gather
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.model_spec import ModelSpec
from lens_megatron.rollout.weight_sync.buckets import Bucket, Described, view
from lens_megatron.rollout.weight_sync.checksums import ExpectedChecksums
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.fleet import Fleet, unfinished
from lens_megatron.rollout.weight_sync.ledger import Entry, Ledger
from lens_megatron.rollout.weight_sync.probe import Probe


class Member(NamedTuple):
    url: str
    ranks: int  # processes with weights of their own
    start: int  # of the server: after a restart at the same address it is in no group any more


TRANSFER_S = 3600.0  # for all parts to be taken; the watch knows sooner whom the others wait for in vain


@dataclass
class Delivery:
    """`members`: the servers that take part, known to all ranks. Fleet and ledger are rank 0's."""

    version: int
    holdings: Holdings
    spec: ModelSpec
    config: SyncConfig
    members: tuple[Member, ...]
    fleet: Fleet | None = None
    ledger: Ledger | None = None
    checksums: ExpectedChecksums | None = None  # where the servers' can be compared with

    @property
    def most_bytes(self) -> int:
        return int(self.config.bucket_mib * 2**20)

    @property
    def unfinished(self) -> str:
        """The version's name for now."""
        return unfinished(self.version)

    def described(self, stage: int | None = None) -> list[Described]:
        """What will be sent, by one stage or by all, in order."""
        shapes = hf_shapes(self.spec)
        return [
            Described(name, self.holdings.shards[names, 0].dtype, shapes[name])
            for names in self.units(stage)
            for name in names
        ]

    def units(self, stage: int | None = None) -> list[tuple[str, ...]]:
        return [u for u in self.holdings.order if stage is None or self.holdings.stage_of(u) == stage]

    def tensors(self, stage: int | None, root: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """HF tensors on `root`; other ranks that hold parts get nothing and must iterate. On the host a part waits for its turn
        as long as those before it take to be delivered, which for a large model is longer than a collective may last."""
        limit_s = TRANSFER_S if device.type == "cpu" else None  # on a GPU no host waits
        return gather(self.holdings, self.spec, self.units(stage), root, device, limit_s)


class Transport(Protocol):
    name: str

    def transfer(self, delivery: Delivery) -> None:
        """On every rank. SyncFailed on rank 0 when no server has all of it; single servers may be lost."""

    def proved(self, version: int, label: str, probe: Probe) -> None:
        """On rank 0: every check of the version has passed, the probe last.
        `label`: what the servers call the weights of this attempt."""

    def close(self, fleet: Fleet | None) -> None:
        """`fleet`: the servers of the last sync, on rank 0."""


@dataclass
class Noted:
    """Entries of what passes through, made on the rank that sends it."""

    entries: list[Entry]
    checksums: ExpectedChecksums | None

    def passing(self, tensors: Iterator[tuple[str, Tensor]], bucket_of: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self.entries.append(
                Entry(
                    name,
                    bucket_of.get(name, 0),
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    tensor.numel() * tensor.element_size(),
                    fingerprint(tensor),
                )
            )
            if self.checksums is not None:
                self.checksums.feed(name, tensor)
            yield name, tensor


def bucket_numbers(buckets: Sequence[Bucket]) -> dict[str, int]:
    return {slot.name: bucket.number for bucket in buckets for slot in bucket.slots}


def fingerprints(bucket: Bucket, buffer_B: Tensor) -> dict[str, str]:
    """Of the tensors as they lie in the bucket's bytes."""
    return {slot.name: fingerprint(view(buffer_B, slot)) for slot in bucket.slots}
