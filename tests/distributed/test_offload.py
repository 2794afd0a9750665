"""A policy that left its device between steps trains as one that stayed; and one stage's tensors gathered by its leader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import offload_cases
from tests.distributed.pool import WorkerPool


@pytest.mark.parametrize(
    ("kind", "layout", "dtype"),
    [("qwen3", {"tp": 2}, torch.float32), ("qwen3_tied", {}, torch.bfloat16), ("qwen3_moe", {"ep": 2}, torch.float32)],
)
def test_training_goes_on_bit_for_bit(
    workers: Any, hf_folder: Callable[[str], Path], kind: str, layout: dict[str, int], dtype: torch.dtype
) -> None:
    parallel = ParallelConfig(**layout)
    pool = workers(2)
    stayed = pool.run(offload_cases.train, hf_folder(kind), parallel, dtype, False)
    left = pool.run(offload_cases.train, hf_folder(kind), parallel, dtype, True)
    for (weights, freed), (expected, _) in zip(left, stayed, strict=True):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        held, freed_bytes, during = freed
        # weights, gradients, and an optimizer's two moments and fp32 weights, over the ranks that share them
        assert freed_bytes >= held
        assert during == 0


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied", "qwen3_moe"])
@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2}])
def test_each_stage_gathers_its_own(
    workers: Any, hf_folder: Callable[[str], Path], kind: str, layout: dict[str, int]
) -> None:
    """Together the leaders have every tensor of the whole export, once, bit for bit; a tied embedding too."""
    results = workers(2).run(offload_cases.by_stage, hf_folder(kind), ParallelConfig(**layout))
    whole = results[0][0]
    together: dict[str, torch.Tensor] = {}
    for _, part, _ in results:
        assert not together.keys() & part.keys()
        together |= part
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    assert all(bool(part) for _, part, _ in results) == ("pp" in layout)
    for _, part, planned in results:  # and the plan that all ranks make says what will come
        assert part == {} or {n: (t.dtype, tuple(t.shape)) for n, t in part.items()} == planned


def test_a_delivery_that_takes_longer_than_a_collective_may(hf_folder: Callable[[str], Path]) -> None:
    """A large model by disk: the second stage waits for its turn until servers or files have taken the first."""
    pool = WorkerPool(2, collective_s=4.0)
    try:
        taken = pool.run(offload_cases.delivered_slowly, hf_folder("qwen3_tied"), ParallelConfig(pp=2), 6.0)
    finally:
        pool.close()
    assert taken[0] > 0 == taken[1]
