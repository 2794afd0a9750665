"""The checksums that guards compare weights by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lens_megatron.rollout.weight_sync.ledger import fingerprint

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def placed_sum(part_N: Tensor, rows_R: Tensor, columns_C: Tensor, start: int = 0) -> Tensor:
    """Of a matrix's elements [start, start + N), row by row: their bits as integers, each times its row's number plus its
    column's, summed modulo 2^64; an int64 scalar where the tensor is.

    Parts of a matrix add up. Rows' numbers are odd and columns' even, so that one flipped bit always shows, and all differ, so
    that elements, rows or columns that changed places do. Reads the tensor twice; copies nothing that is contiguous.
    """
    bits_N = part_N.contiguous().view(-1).view(_INTEGERS[part_N.element_size()])
    width = columns_C.numel()
    total = torch.zeros((), dtype=torch.int64, device=bits_N.device)
    done = 0
    while done < bits_N.numel():  # at most the rest of a row, whole rows, and the beginning of one
        row, column = divmod(start + done, width)
        left = bits_N.numel() - done
        count = min(width - column, left) if column or left < width else left // width * width
        block_RC = bits_N[done : done + count].view(-1, min(count, width))
        rows, columns = block_RC.shape
        total += (block_RC.sum(1, dtype=torch.int64) * rows_R[row : row + rows]).sum()
        total += (block_RC.sum(0, dtype=torch.int64) * columns_C[column : column + columns]).sum()
        done += count
    return total


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
