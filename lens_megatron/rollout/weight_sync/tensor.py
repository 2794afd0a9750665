"""Weights in the body of a request.

A bucket pickled as SGLang unpickles it and in base64, once for each tensor-parallel rank of the server. To a server that
this run started on rank 0's machine the bytes do not travel: they lie in shared memory that the server maps, and the
request says where. To others they are in the body, which SGLang takes far slower than it copies memory. From GPU to GPU
only a handle would have to travel (CUDA IPC): that is not written.
"""

from __future__ import annotations

import base64
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from lens_megatron.mcore.hf_bridge import exhaust
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.weight_sync.buckets import Bucket, Buffers, plan_buckets
from lens_megatron.rollout.weight_sync.delivery import Delivery, Noted, bucket_numbers, fingerprints
from lens_megatron.rollout.weight_sync.fleet import Fleet
from lens_megatron.rollout.weight_sync.probe import Probe

CPU = torch.device("cpu")
SHARED_MEMORY = "/dev/shm"


class TensorTransport:
    name = "tensor"

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def transfer(self, delivery: Delivery) -> None:
        tensors = delivery.tensors(None, root=0, device=CPU)
        try:
            if dist.get_rank() == 0:
                self._post(delivery, plan_buckets([delivery.described()], delivery.most_bytes), tensors)
        finally:
            exhaust(tensors)

    def _post(self, delivery: Delivery, buckets: list[Bucket], tensors: Iterator[tuple[str, Tensor]]) -> None:
        """One bucket is gathered and encoded while the servers take the one before."""
        fleet, ledger = delivery.fleet, delivery.ledger
        assert fleet is not None and ledger is not None
        noted = Noted([], delivery.checksums)
        incoming = noted.passing(tensors, bucket_numbers(buckets))
        buffers = Buffers(buckets, CPU, self._kept)
        sharing = fleet.sharing if _has_room(2 * max(bucket.bytes for bucket in buckets), self._kept) else frozenset()
        under_way: tuple[Bucket, Tensor, dict[str, Future[None]]] | None = None

        def acknowledged() -> tuple[Bucket, Tensor] | None:
            if under_way is None:
                return None
            bucket, buffer_B, asked = under_way
            for url in fleet.collect(asked):
                ledger.acknowledge(url, bucket.number)
            fleet.need_one()
            return bucket, buffer_B

        for bucket in buckets:
            buffer_B = buffers.fill(bucket, incoming)
            ledger.add(noted.entries)
            noted.entries.clear()
            whole = encode(bucket, buffer_B) if set(fleet.live) - sharing else b""
            payloads = {
                url: [encode_place(bucket, buffer_B) if url in sharing else whole for _ in range(fleet.infos[url].tp)]
                for url in fleet.live
            }
            arrived = acknowledged()
            asked = fleet.start(partial(_hand_over, payloads=payloads, unfinished=delivery.unfinished))
            under_way = bucket, buffer_B, asked
            if arrived is not None:
                ledger.sent(fingerprints(*arrived))
        if (arrived := acknowledged()) is not None:
            ledger.sent(fingerprints(*arrived))
        if fleet.lost:
            self._kept = []  # somebody may still read what is in them

    def proved(self, version: int, label: str, probe: Probe) -> None:
        pass

    def close(self, fleet: Fleet | None) -> None:
        self._kept = []


async def _hand_over(server: SGLangClient, payloads: Mapping[str, Sequence[bytes]], unfinished: str) -> None:
    await server.update_weights_from_tensor(payloads[server.url], unfinished, "flattened_bucket")


def encode(bucket: Bucket, buffer_B: Tensor) -> bytes:
    """base64 of what SGLang's `flattened_bucket` unpickles to; of classes only those that it allows."""
    # a tensor is pickled with its whole storage: one that is the bucket's bytes and no more
    exact_B = torch.frombuffer(buffer_B.numpy(), dtype=torch.uint8)
    return base64.b64encode(pickle.dumps(_content(bucket, exact_B), protocol=4))


def encode_place(bucket: Bucket, buffer_B: Tensor) -> bytes:
    """The same for a process of this machine that maps the bytes; to be unpickled once, as each counts as a reader.

    The first time moves the buffer into shared memory. It belongs to torch's own manager process, which frees it when the
    last process that has it is gone, however it went.
    """
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")  # by name: a descriptor can be passed to relatives only
    try:
        return base64.b64encode(bytes(ForkingPickler.dumps(_content(bucket, buffer_B), protocol=4)))
    finally:
        multiprocessing.set_sharing_strategy(before)


def _has_room(size: int, kept: list[Tensor]) -> bool:
    """In a container it is often 64 MiB, and writing beyond it ends the process."""
    if kept and kept[0].is_shared():
        return True
    try:
        return shutil.disk_usage(SHARED_MEMORY).free > size
    except OSError:
        return False


def _content(bucket: Bucket, bytes_B: Tensor) -> dict[str, Any]:
    metadata = [
        SimpleNamespace(
            name=slot.name,
            shape=torch.Size(slot.shape),
            dtype=slot.dtype,
            start_idx=slot.start,
            end_idx=slot.stop,
            numel=slot.stop - slot.start,
        )
        for slot in bucket.slots
    ]
    return {"flattened_tensor": bytes_B, "metadata": metadata}
