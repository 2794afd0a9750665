"""benchmarks/head_memory.py on a small vocabulary; and that what it measures is what is allocated."""

from __future__ import annotations

import pytest
import torch

from benchmarks.head_memory import TARGET, materialised, measure, peak_bytes
from lens_megatron.mcore.head import token_logprobs_and_entropy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's way of measuring")


def test_peak_is_what_was_held_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(100_000)  # 400,000 bytes
        second = torch.ones(300_000)
        del second
        return first + torch.ones(100_000)

    assert peak_bytes(work) == pytest.approx(1_600_000, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_head_stays_below_its_target(dtype: str) -> None:
    found = measure(tokens=64, hidden=8, vocabulary=26_000, dtype=dtype)
    assert found.logits_bytes == 64 * 26_000 * 4
    assert 0.005 < found.ratio < TARGET
    assert found.materialised_bytes > 2 * found.logits_bytes


def test_both_compute_the_same() -> None:
    hidden, weight, labels = torch.randn(9, 8), torch.randn(700, 8), torch.randint(0, 700, (9,))
    for mine, theirs in zip(
        token_logprobs_and_entropy(hidden, weight, labels), materialised(hidden, weight, labels), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
