"""Who may pin host memory."""

from __future__ import annotations

import pytest
import torch

from lens_megatron.mcore import pinning
from lens_megatron.mcore.pinning import may_pin, room_to_pin

GIB = 2**30


def test_what_may_be_pinned() -> None:
    sizes = [3 * GIB // 4, GIB, 0]  # as torch rounds them: 1 GiB each
    assert room_to_pin(sizes, ranks=1, free=4 * GIB)
    assert not room_to_pin(sizes, ranks=1, free=4 * GIB - 2)
    assert room_to_pin(sizes, ranks=8, free=32 * GIB)
    assert not room_to_pin(sizes, ranks=8, free=16 * GIB)
    assert not room_to_pin(sizes, ranks=1, free=None)  # who does not know does not take


def test_ranks_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinning, "free_memory_bytes", lambda: 4 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert may_pin([GIB])
    assert not may_pin([GIB, GIB])


def test_without_a_gpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not may_pin([1])
