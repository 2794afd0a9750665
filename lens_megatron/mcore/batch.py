"""A pack as tensors: what the model reads, and where each of its tokens' results belong.

Results are flat: all sequences of the batch end to end, without padding. Place f of the flat vector belongs to the token
itself: its log-prob given what came before. A sequence's first token has none.

Shapes: F places of the flat vector, T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.mcore.attention import PackedSequences, packed_sequences
from lens_megatron.mcore.packing import Pack, local_positions
from lens_megatron.mcore.runtime import device


@dataclass(frozen=True)
class PackedBatch:
    tokens_1T: Tensor
    position_ids_1T: Tensor
    labels_T: Tensor  # the next token; 0 where there is none
    target_T: Tensor  # place in the flat vector of the token predicted here; -1 where none is
    sequence_T: Tensor  # which sequence of the batch; that of its neighbour where padding
    packed: PackedSequences


def flat_offsets(sequences: Sequence[Tensor]) -> list[int]:
    """Where each sequence begins in the flat vector, and the vector's length."""
    return [0, *accumulate(len(sequence) for sequence in sequences)]


def own_places(pack: Pack, offsets: Sequence[int]) -> Tensor:
    """[T]: the flat place of the token that each of this rank's positions holds; -1 for padding."""
    place = torch.full((pack.tokens,), -1, dtype=torch.long)
    start = 0
    for number, padded in enumerate(pack.padded_lengths):
        if pack.sequences:
            index = pack.sequences[number]
            first, last = offsets[index], offsets[index + 1]
            place[start : start + last - first] = torch.arange(first, last)
        start += padded
    return place[_held_here(pack)]


def _held_here(pack: Pack) -> Tensor:
    ranks = parallel_state.get_context_parallel_world_size()
    return local_positions(pack.padded_lengths, ranks, parallel_state.get_context_parallel_rank())


def pack_tensors(pack: Pack, sequences: Sequence[Tensor], offsets: Sequence[int]) -> PackedBatch:
    """This rank's part of a pack; `offsets` are flat_offsets of all the sequences.

    Labels are shifted before context parallelism cuts the sequences.
    """
    total = pack.tokens
    tokens, labels, positions = (torch.zeros(total, dtype=torch.long) for _ in range(3))
    target = torch.full((total,), -1, dtype=torch.long)
    owner = torch.zeros(total, dtype=torch.long)
    start = 0
    for place, padded in enumerate(pack.padded_lengths):
        positions[start : start + padded] = torch.arange(padded)
        if pack.sequences:
            index = pack.sequences[place]
            sequence, length = sequences[index], len(sequences[index])
            tokens[start : start + length] = sequence
            labels[start : start + length - 1] = sequence[1:]
            target[start : start + length - 1] = torch.arange(offsets[index] + 1, offsets[index] + length)
            owner[start : start + padded] = index
        start += padded
    mine = _held_here(pack)
    where = device()
    return PackedBatch(
        tokens_1T=tokens[mine][None].to(where),
        position_ids_1T=positions[mine][None].to(where),
        labels_T=labels[mine].to(where),
        target_T=target[mine].to(where),
        sequence_T=owner[mine].to(where),
        packed=packed_sequences(
            pack.padded_lengths,
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
            where,
        ),
    )
