"""Tensors cut into buckets, and a bucket as one run of bytes. A bucket is max(limit, its largest tensor).

Layout of the bytes, which SGLang reads back by names, dtypes and shapes alone: one tensor after the other, without gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Bucket:
    """`stage`: the pipeline stage whose leader sends it. Numbered in the one order that all servers take them in."""

    number: int
    stage: int
    slots: tuple[Slot, ...]

    @property
    def bytes(self) -> int:
        return self.slots[-1].stop


@dataclass(frozen=True)
class Described:
    """A tensor that a stage will send."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_buckets(stages: Sequence[Sequence[Described]], most_bytes: int) -> list[Bucket]:
    """Every rank computes the same plan. Stages take turns, so that one gathers its next bucket while another sends."""
    queues = [list(_cut(tensors, most_bytes)) for tensors in stages]
    buckets: list[Bucket] = []
    for turn in range(max(map(len, queues), default=0)):
        for stage, queue in enumerate(queues):
            if turn < len(queue):
                buckets.append(Bucket(len(buckets), stage, queue[turn]))
    return buckets


def _cut(tensors: Iterable[Described], most_bytes: int) -> Iterator[tuple[Slot, ...]]:
    slots: list[Slot] = []
    position = 0
    for tensor in tensors:
        if slots and position + tensor.bytes > most_bytes:
            yield tuple(slots)
            slots, position = [], 0
        # tensors of one dtype need no padding; a dtype that would not be aligned starts a bucket of its own
        if position % tensor.dtype.itemsize:
            yield tuple(slots)
            slots, position = [], 0
        slots.append(Slot(tensor.name, tensor.dtype, tensor.shape, position, position + tensor.bytes))
        position += tensor.bytes
    if slots:
        yield tuple(slots)


class Buffers:
    """Two buffers that buckets are filled into by turns: one is filled while the other is on its way."""

    def __init__(self, buckets: Iterable[Bucket], device: torch.device, kept: list[Tensor] | None = None) -> None:
        """`kept`: the buffers of the sync before, and after it. Fresh memory of a CPU costs several times its copying; a
        GPU's allocator keeps its own."""
        size = max((bucket.bytes for bucket in buckets), default=0)
        self._size, self._device = size, device
        self._buffers = kept if kept is not None and device.type == "cpu" else []
        if self._buffers and self._buffers[0].numel() < size:
            self._buffers.clear()
        self._next = 0

    def fill(self, bucket: Bucket, tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
        """The bucket's bytes, its tensors taken from `tensors` in order; valid until the next but one is filled."""
        if self._next == len(self._buffers):
            self._buffers.append(torch.empty(self._size, dtype=torch.uint8, device=self._device))
        buffer_B = self._buffers[self._next][: bucket.bytes]
        self._next = 1 - self._next
        for slot in bucket.slots:
            name, tensor = next(tensors)
            if (name, tensor.dtype, tuple(tensor.shape)) != (slot.name, slot.dtype, slot.shape):
                raise AssertionError(f"{name} {tensor.dtype} {tuple(tensor.shape)} came where {slot} was planned")
            view(buffer_B, slot).copy_(tensor)
        return buffer_B


def view(buffer_B: Tensor, slot: Slot) -> Tensor:
    """The slot's tensor inside the bucket's bytes."""
    return buffer_B[slot.start : slot.stop].view(slot.dtype).view(slot.shape)
