"""Buffers and optimizer pieces against a slow element-by-element version; real models are counted in tests/distributed."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.planning.buffers import lay_out


def slow(sizes: list[int], ranks: int, shared: set[int], bucket_size: int | None) -> tuple[list[int], list[list[int]]]:
    """The owner (tensor, or -1 for padding) of every element; bucket by bucket."""
    unit = math.lcm(ranks, 128)
    buckets: list[list[int]] = [[]]
    for index in reversed(range(len(sizes))):
        bucket = buckets[-1]
        bucket += [-1] * (-len(bucket) % 64)
        if index in shared and bucket:
            buckets.append([])
            bucket = buckets[-1]
        bucket += [index] * sizes[index]
        if index in shared or (bucket_size is not None and len(bucket) >= bucket_size):
            buckets.append([])
    if not buckets[-1]:
        buckets.pop()
    for bucket in buckets:
        bucket += [-1] * (-len(bucket) % unit)
    owned = []
    for rank in range(ranks):
        pieces = [b[rank * len(b) // ranks : (rank + 1) * len(b) // ranks] for b in buckets]
        elements = sum(owner >= 0 for piece in pieces for owner in piece)
        tensors = sum(len(set(piece) - {-1}) for piece in pieces)
        owned.append([elements, tensors])
    return [len(bucket) for bucket in buckets], owned


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    ranks=st.integers(1, 6),
    shared=st.sets(st.integers(0, 11), max_size=2),
    bucket_size=st.none() | st.integers(1, 900),
)
def test_equals_the_slow_version(sizes: list[int], ranks: int, shared: set[int], bucket_size: int | None) -> None:
    shared = {index for index in shared if index < len(sizes)}
    buffer = lay_out(sizes, ranks, sorted(shared), bucket_size)
    lengths, owned = slow(sizes, ranks, shared, bucket_size)
    assert [end - start for start, end in buffer.buckets] == lengths
    found = buffer.owned()
    assert [list(pair) for pair in zip(found.elements.tolist(), found.pieces.tolist(), strict=True)] == owned
    assert int(found.elements.sum()) == sum(sizes)
