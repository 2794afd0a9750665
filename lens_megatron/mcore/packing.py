"""Ragged sequences into packs of at most a token budget: as many packs on every data-parallel rank, and as even as can be.

Every rank knows every length, so every rank computes the same plan: no counts need to be exchanged, and no rank can wait
for a micro-batch that another does not have.

A sequence is padded to a multiple of 2 x cp (each context-parallel rank holds two chunks of it), and a pack to a multiple
that gives every tensor-parallel rank the same number of tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig, check_budget, pack_unit, padding_reserved, sequence_unit


@dataclass(frozen=True)
class Pack:
    """One micro-batch: sequences (indices into the batch) laid end to end. A pack without sequences is pure padding."""

    sequences: tuple[int, ...]
    padded_lengths: tuple[int, ...]  # one per sequence, or a single one for pure padding

    @property
    def tokens(self) -> int:
        return sum(self.padded_lengths)


def plan_packs(
    lengths: Sequence[int], budget: int, *, dp: int = 1, cp: int = 1, tp: int = 1, multiple: int = 1
) -> list[list[Pack]]:
    """For each data-parallel rank its packs, equally many on every rank, their number a multiple of `multiple`.

    `budget` counts a micro-batch's tokens over all its context-parallel ranks, padding included.
    """
    check_budget("update.tokens_per_microbatch", budget, max(lengths, default=0), ParallelConfig(tp=tp, cp=cp))
    padded = [_round_up(length, sequence_unit(cp)) for length in lengths]
    room = budget - padding_reserved(cp, tp)
    if room < 1:
        raise UsageError(f"update.tokens_per_microbatch: {budget} tokens hold no sequence in this layout; set more")
    bins = _fewest_bins(padded, room, dp * multiple)
    # Heaviest first, dealt there and back again, so that the ranks' sums are even.
    ordered = sorted(bins, key=lambda bin_: (-bin_[0], bin_[1]))
    ranks: list[list[Pack]] = [[] for _ in range(dp)]
    for place, (_, members) in enumerate(ordered):
        lap, seat = divmod(place, dp)
        ranks[seat if lap % 2 == 0 else dp - 1 - seat].append(_pack(members, padded, cp, tp))
    return ranks


def _fewest_bins(padded: Sequence[int], room: int, step: int) -> list[tuple[int, list[int]]]:
    """As few as hold everything, in steps of `step`, found in about log(n) tries: with one more a try, a batch with many
    long sequences took time that grew with its square."""

    def spread(steps: int) -> list[tuple[int, list[int]]] | None:
        bins = _spread(padded, steps * step)
        return bins if all(load <= room for load, _ in bins) else None

    too_few = max(1, -(-sum(padded) // (room * step))) - 1  # less than all the room that is needed
    steps, stride = too_few + 1, 1
    while (bins := spread(steps)) is None:
        too_few, steps, stride = steps, steps + stride, 2 * stride
    while steps - too_few > 1:
        middle = (too_few + steps) // 2
        if (fewer := spread(middle)) is None:
            too_few = middle
        else:
            steps, bins = middle, fewer
    return bins


def _spread(padded: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """Longest first, each into the emptiest of `count` bins: (tokens, members in batch order)."""
    heap: list[tuple[int, int]] = [(0, number) for number in range(count)]
    members: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(padded)), key=lambda i: (-padded[i], i)):
        load, number = heapq.heappop(heap)
        members[number].append(index)
        heapq.heappush(heap, (load + padded[index], number))
    return [(load, sorted(members[number])) for load, number in heap]


def _pack(members: list[int], padded: Sequence[int], cp: int, tp: int) -> Pack:
    lengths = [padded[index] for index in members] or [pack_unit(cp, tp)]
    lengths[-1] += _round_up(sum(lengths), pack_unit(cp, tp)) - sum(lengths)
    return Pack(tuple(members), tuple(lengths))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def local_positions(lengths: Sequence[int], ranks: int, rank: int) -> Tensor:
    """Places in the pack that a context-parallel rank holds: chunks `rank` and `2 ranks - 1 - rank` of every sequence."""
    parts, start = [], 0
    for length in lengths:
        if ranks == 1:
            parts.append(torch.arange(start, start + length))
        else:
            chunk = length // (2 * ranks)
            for number in (rank, 2 * ranks - 1 - rank):
                parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(parts)
