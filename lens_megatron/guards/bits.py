"""The checksums that guards compare weights by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lens_megatron.rollout.weight_sync.ledger import fingerprint

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the elements' bits as integers, modulo 2^64; an int64 scalar where the tensor is. Reads it once, copies
    nothing that is contiguous."""
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


class PassingSums:
    """Fingerprints of tensors on their way, by name, and the seconds that they took."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}
        self.seconds = 0.0

    def of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            with self.timed():
                self.sums[name] = fingerprint(tensor)
            yield name, tensor

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
