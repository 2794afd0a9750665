"""Pinned host memory, from which a GPU is reached several times faster: whether there is room for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from lens_megatron.machine import free_memory_bytes


def may_pin(sizes: Sequence[int]) -> bool:
    """Whether each rank of this machine may pin host tensors of these bytes. Without a GPU there is nothing to pin for."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.cuda.is_available() and room_to_pin(sizes, ranks, free_memory_bytes())


def room_to_pin(sizes: Sequence[int], ranks: int, free: int | None) -> bool:
    """Pinned memory cannot be swapped out or given to others: no more than half of what is free, over this machine's ranks.
    torch rounds each tensor up to a power of two."""
    needed = sum(1 << (size - 1).bit_length() for size in sizes if size > 0)
    return free is not None and needed * ranks <= free // 2
