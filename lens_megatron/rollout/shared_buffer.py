"""Tensors handed to another process through memory that both map.

The memory has no name: it belongs to a file descriptor passed along the pipe, so nothing is left behind when either
process is killed, and it is reserved before use, so that too little of it is an error and not a crash.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from lens_megatron.errors import RunError

ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SharedBuffer:
    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)

    @classmethod
    def create(cls, size: int) -> SharedBuffer:
        available = psutil.virtual_memory().available
        if size > available:  # asked before reserving: the kernel would rather kill a process than refuse
            raise RunError(f"weight sync: a bucket of {size / 2**20:.0f} MiB, {available / 2**20:.0f} MiB are free")
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("weights")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise RunError(
                f"weight sync: no {size / 2**20:.0f} MiB for a bucket of weights ({error.strerror})"
            ) from None
        return cls(descriptor, size)

    def write(self, bucket: Mapping[str, torch.Tensor]) -> list[Place]:
        places, offset = [], 0
        for name, tensor in bucket.items():
            place = Place(name, tensor.dtype, tuple(tensor.shape), offset)
            self._view(place).copy_(tensor)
            places.append(place)
            offset += _aligned(tensor)
        return places

    def read(self, places: list[Place]) -> dict[str, torch.Tensor]:
        """Views, valid until the next write."""
        return {place.name: self._view(place) for place in places}

    def _view(self, place: Place) -> torch.Tensor:
        count = torch.Size(place.shape).numel()
        return torch.frombuffer(self._memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)

    def close(self) -> None:
        os.close(self.descriptor)  # the mapping goes when the last view of it does


def bytes_needed(bucket: Mapping[str, torch.Tensor]) -> int:
    return max(ALIGNMENT, sum(_aligned(tensor) for tensor in bucket.values()))


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
