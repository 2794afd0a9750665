"""Megatron-Core's parameter and gradient buffers, and what the distributed optimizer keeps of them: to the byte.

A buffer lays tensors end to end in reverse order, each at a multiple of 64 elements. Buckets end at a multiple of 128 and of
the number of data-parallel ranks; each of those ranks owns an equal piece of every bucket, wherever tensors begin and end,
and keeps optimizer state for the tensors' elements (not for padding) in its pieces.
Source: megatron-core 0.16.1, core/distributed/param_and_grad_buffer.py and core/optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens_megatron.planning.shards import ChunkTensors

_TENSOR_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class Owned:
    """What each data-parallel rank has optimizer state for, by rank."""

    elements: np.ndarray
    pieces: np.ndarray  # of tensors; torch's AdamW counts steps for each

    def __add__(self, other: Owned) -> Owned:
        return Owned(self.elements + other.elements, self.pieces + other.pieces)


@dataclass(frozen=True)
class Buffer:
    """The places of all tensors of one kind of one chunk."""

    ranks: int
    starts: np.ndarray
    ends: np.ndarray
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self) -> Owned:
        begins = np.array([start for start, _ in self.buckets])[:, None]
        shares = np.array([(end - start) // self.ranks for start, end in self.buckets])[:, None]
        edges = begins + shares * np.arange(self.ranks + 1)  # [buckets, ranks + 1]
        elements = np.diff(self._elements_before(edges), axis=1)
        ended = np.searchsorted(self.ends, edges[:, :-1], side="right")  # tensors that end before the piece begins
        begun = np.searchsorted(self.starts, edges[:, 1:], side="left")  # tensors that begin before it ends
        return Owned(elements.sum(axis=0), (begun - ended).sum(axis=0))

    def _elements_before(self, places: np.ndarray) -> np.ndarray:
        sizes = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        whole = np.searchsorted(self.ends, places, side="right")
        within = np.zeros_like(places)
        inside = whole < len(self.starts)
        within[inside] = np.maximum(0, places[inside] - self.starts[whole[inside]])
        return sizes[whole] + within


def lay_out(sizes: Sequence[int], ranks: int, shared: Sequence[int] = (), bucket_size: int | None = None) -> Buffer:
    """`bucket_size`: elements after which a bucket is closed; None: one bucket for all."""
    unit = math.lcm(ranks, _BUCKET_ALIGNMENT)
    if bucket_size is None and not shared:
        backwards = np.asarray(sizes[::-1], dtype=np.int64)
        spans = -(-backwards // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        starts = np.concatenate([[0], np.cumsum(spans)[:-1]]).astype(np.int64) if len(spans) else backwards
        ends = starts + backwards
        whole = -(-int(ends[-1]) // unit) * unit if len(ends) else 0
        return Buffer(ranks, starts, ends, ((0, whole),) if whole else ())
    starts_, ends_, buckets = [], [], []
    place = bucket_start = 0
    open_tensors = 0

    def close(at: int) -> int:
        nonlocal bucket_start, open_tensors
        end = -(-at // unit) * unit
        buckets.append((bucket_start, end))
        bucket_start, open_tensors = end, 0
        return end

    for index in range(len(sizes) - 1, -1, -1):
        start = -(-place // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        if index in shared and open_tensors:
            start = close(start)
        place = start + sizes[index]
        starts_.append(start)
        ends_.append(place)
        open_tensors += 1
        if index in shared or (bucket_size is not None and place - bucket_start >= bucket_size):
            place = close(place)
    if open_tensors:
        close(place)
    return Buffer(ranks, np.asarray(starts_, dtype=np.int64), np.asarray(ends_, dtype=np.int64), tuple(buckets))


def chunk_buffers(chunk: ChunkTensors, ranks: int, expert_ranks: int, bucket_size: int | None = None) -> list[Buffer]:
    """Dense tensors over `ranks` data- and context-parallel ranks, experts over those that hold the same ones."""
    buffers = [lay_out(chunk.dense, ranks, chunk.shared, bucket_size)] if chunk.dense else []
    return buffers + ([lay_out(chunk.expert, expert_ranks, (), bucket_size)] if chunk.expert else [])


def default_bucket_size(dp: int) -> int:
    """Megatron-Core's, when gradients are reduced while the backward pass runs: on CUDA, with several ranks."""
    return max(40_000_000, 1_000_000 * dp)
