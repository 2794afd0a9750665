"""Weights in the body of a request.

A bucket's bytes, pickled as SGLang unpickles them and in base64, once for each tensor-parallel rank of the server. On a
GPU that trainer and server share only a handle would have to travel (CUDA IPC): that is not written.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.rollout.weight_sync.buckets import Bucket, Buffers, plan_buckets
from lens_megatron.rollout.weight_sync.delivery import Delivery, Noted, bucket_numbers, exhaust, fingerprints

CPU = torch.device("cpu")


class TensorTransport:
    name = "tensor"

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
        buffers = Buffers(buckets, CPU)
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
            payload = encode(bucket, buffer_B)
            arrived = acknowledged()
            asked = fleet.start(
                lambda server, payload=payload: server.update_weights_from_tensor(
                    [payload] * fleet.ranks(server.url), delivery.unfinished, "flattened_bucket"
                )
            )
            under_way = bucket, buffer_B, asked
            if arrived is not None:
                ledger.sent(fingerprints(*arrived))
        if (arrived := acknowledged()) is not None:
            ledger.sent(fingerprints(*arrived))

    def proved(
        self, version: int, label: str, probe: Sequence[int], logprobs: Sequence[float], tolerance: float
    ) -> None:
        pass

    def close(self) -> None:
        pass


def encode(bucket: Bucket, buffer_B: Tensor) -> bytes:
    """base64 of what SGLang's `flattened_bucket` unpickles to; of classes only those that it allows."""
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
    # a tensor is pickled with its whole storage: one that is the bucket's bytes and no more
    exact_B = torch.frombuffer(buffer_B.numpy(), dtype=torch.uint8)
    return base64.b64encode(pickle.dumps({"flattened_tensor": exact_B, "metadata": metadata}, protocol=4))
