"""Fingerprints of tensors and placed sums of their parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lens_megatron import fingerprints
from lens_megatron.fingerprints import fingerprint, odd_words, placed_sum


@settings(max_examples=60, deadline=None)
@given(
    count=st.one_of(st.integers(1, 300), st.integers(32700, 32900)),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(count=62, place=1455, bit=0, dtype=torch.float32)  # a high bit, where a word counted an even number of times
def test_one_changed_bit_changes_the_fingerprint(count: int, place: int, bit: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    changed = tensor.clone()
    bytes_B = changed.view(torch.uint8)
    bytes_B[place % bytes_B.numel()] ^= 1 << bit
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(changed)


def test_fingerprint_sees_places_not_only_values() -> None:
    """Changes of one unit in the last place up here and down there cancel in a plain sum."""
    tensor = torch.ones(3, 20000, dtype=torch.bfloat16)
    bits = tensor.view(torch.int16)
    seen = {fingerprint(tensor)}
    for row, up, down in ((0, 5, 9), (1, 5, 9), (2, 5, 19999), (0, 9, 5)):
        bits[row, up] += 1
        bits[row, down] -= 1
        seen.add(fingerprint(tensor))
        bits[row, up] -= 1
        bits[row, down] += 1
    assert len(seen) == 5
    a = torch.arange(100.0)
    assert fingerprint(a) != fingerprint(a.flip(0))


def test_fingerprints_are_the_same_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**62), 2**62, (50 * 4096 + 77,))
    by_blocks = fingerprint(words)
    monkeypatch.setattr(fingerprints, "_CACHED_ROWS", 10**6)
    assert fingerprint(words) == by_blocks


def summed(part_N: torch.Tensor, start: int = 0) -> int:
    """Of a part of a matrix of 8 columns."""
    words = torch.empty(8, dtype=torch.int64)
    return int(placed_sum(part_N, odd_words(words, 1), odd_words(words, 2) << 1, start))


@given(st.integers(0, 63), st.integers(0, 15), st.integers(0, 64), st.sampled_from([torch.bfloat16, torch.float32]))
def test_any_flipped_bit_changes_the_sum_and_parts_add_up(place: int, bit: int, cut: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = summed(tensor)
    total = (summed(tensor[:cut]) + summed(tensor[cut:], cut)) % 2**64
    assert total == before % 2**64
    assert summed(torch.zeros(5, dtype=dtype)) == 0
    integers = tensor.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    integers[place] ^= 1 << bit if bit < 15 else -1 << 15
    assert summed(tensor) != before


@given(st.integers(0, 63), st.integers(0, 63))
def test_elements_that_changed_places_change_the_sum(one: int, other: int) -> None:
    tensor = torch.arange(64.0)
    before = summed(tensor)
    tensor[[one, other]] = tensor[[other, one]]
    assert (summed(tensor) == before) is (one == other)


@given(st.permutations(range(8)), st.booleans())
def test_rows_and_columns_that_changed_places_change_the_sum(order: list[int], columns: bool) -> None:
    matrix = torch.arange(64.0).view(8, 8)
    moved = matrix[:, order] if columns else matrix[order]
    assert (summed(moved) == summed(matrix)) is (order == sorted(order))
