"""How much log-probs move when nothing but the packing changes: what a noise floor is measured from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_megatron.mcore.step import ShardedModel


def evaluations_in_other_packings(
    model: ShardedModel, sequences: Sequence[Tensor], tokens_per_microbatch: int
) -> list[Tensor]:
    """For each sequence its log-probs [3, T] under three packings: as usual, every sequence alone, and two by two."""
    # one sequence's own budget makes every pack hold one; padding for context and tensor parallelism needs some room
    longest = max(len(sequence) for sequence in sequences) + 4 * (
        model.config.context_parallel_size * model.config.tensor_model_parallel_size
    )
    usual = model.score(sequences, tokens_per_microbatch, entropy=False).logprobs
    alone = [model.score([s], max(longest, len(s)), entropy=False).logprobs[0] for s in sequences]
    doubled = model.score([*sequences, *sequences], min(tokens_per_microbatch, 2 * longest), entropy=False).logprobs
    return [torch.stack(rows) for rows in zip(usual, alone, doubled[: len(sequences)], strict=True)]
