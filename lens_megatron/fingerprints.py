"""Fingerprints and sums that weights are compared by, from their bits alone.

A fingerprint is of one tensor's bytes as they lie; a placed sum is of a part of a matrix and adds up with the sums of the
other parts, however it was cut. Both are modulo 2^64 with fixed weights: any process, any device, the same number.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_WIDTH = 4096  # words a row of the fingerprint's matrix
_CACHED_ROWS = 16
_WORDS: dict[tuple[str, int], Tensor] = {}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """16 hex digits of a tensor's bytes, on its own device, at the speed of one read (two on a GPU).

    The bytes are a matrix of 64-bit words; its column sums are weighed with fixed odd numbers and its row sums with
    fixed even ones, modulo 2^64. A word so counts an odd number of times, and one changed word always shows: an even
    number would lose its highest bits. Not cryptographic: it guards against faults, not against people.
    """
    bytes_B = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = bytes_B.numel() // (8 * _WIDTH) * (8 * _WIDTH)
    total = bytes_B.numel()
    for rows_RW in (bytes_B[:whole].view(torch.int64).view(-1, _WIDTH), _padded(bytes_B[whole:])):
        if rows_RW.numel():
            columns_W, rows_R = _sums(rows_RW)
            weighed_W, weighed_R = columns_W * odd_words(columns_W, 1), rows_R * (odd_words(rows_R, 2) << 1)
            total = total * 31 + int(weighed_W.sum() + weighed_R.sum())
    return f"{total % 2**64:016x}"


def _sums(rows_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Over rows and over columns; on a CPU block by block, so that the second sum reads its cache."""
    if rows_RW.device.type != "cpu":
        return rows_RW.sum(0), rows_RW.sum(1)
    columns_W = rows_RW.new_zeros(rows_RW.shape[1])
    rows = []
    for block_RW in rows_RW.split(_CACHED_ROWS):
        columns_W += block_RW.sum(0)
        rows.append(block_RW.sum(1))
    return columns_W, torch.cat(rows)


def _padded(bytes_B: Tensor) -> Tensor:
    """As rows of words, the last filled with zeros."""
    filled_B = bytes_B.new_zeros(-(-bytes_B.numel() // (8 * _WIDTH)) * 8 * _WIDTH)
    filled_B[: bytes_B.numel()] = bytes_B
    return filled_B.view(torch.int64).view(-1, _WIDTH)


def odd_words(like: Tensor, seed: int, start: int = 0) -> Tensor:
    """Fixed odd numbers from number `start` on, as many as `like` has elements; the same in every process."""
    key, stop = (str(like.device), seed), start + like.numel()
    have = _WORDS.get(key)
    if have is None or have.numel() < stop:
        count = max(_WIDTH, 2 * stop)
        words = torch.arange(1, count + 1, dtype=torch.int64) * (0x9E3779B97F4A7C15 - 2**64) + seed
        words = (words ^ (words >> 31)) * (0xBF58476D1CE4E5B9 - 2**64)
        words = (words ^ (words >> 29)) * 0x14D049BB133111EB
        have = _WORDS[key] = (words | 1).to(like.device)
    return have[start:stop]


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
