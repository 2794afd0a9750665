"""Rotary embeddings of a pack against a rotation of each pair as a complex number, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lens_megatron.mcore import rotary


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1, 0], [3, 4, 0, 1, 9, 8], [0]])
def test_every_token_turns_by_its_own_position(positions: list[int]) -> None:
    heads, size = 3, 8
    x_TND = torch.randn(len(positions), heads, size, dtype=torch.float64)
    frequencies = torch.tensor([10000 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    angles = torch.arange(10)[:, None] * torch.cat([frequencies, frequencies])  # as Megatron-Core gives them
    table = rotary.gathered(angles[:, None, None], torch.tensor([positions]), torch.float64)
    config = SimpleNamespace(apply_rope_fusion=False)
    found = rotary.apply_gathered(x_TND, table, config, cu_seqlens=torch.tensor([0, len(positions)]))
    for token, position in enumerate(positions):
        for i in range(size // 2):
            turned = torch.complex(x_TND[token, :, i], x_TND[token, :, i + size // 2])
            turned = turned * torch.exp(1j * position * frequencies[i])
            torch.testing.assert_close(found[token, :, i], turned.real)
            torch.testing.assert_close(found[token, :, i + size // 2], turned.imag)


def test_gradients_turn_back() -> None:
    x_TND = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    table = rotary.gathered(
        torch.randn(9, 1, 1, 4).double().repeat(1, 1, 1, 2), torch.tensor([[0, 3, 8, 1, 1]]), torch.float64
    )
    config = SimpleNamespace(apply_rope_fusion=False)
    assert torch.autograd.gradcheck(lambda x: rotary.apply_gathered(x, table, config, cu_seqlens=table), x_TND)


def test_one_kernel_does_the_same() -> None:
    """What CUDA runs, here through the compiler's front end alone."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(rotary.turned, dynamic=True, backend=backend)
    for tokens in (5, 7, 12):
        x, cos, sin = torch.randn(tokens, 3, 8), torch.randn(tokens, 1, 4), torch.randn(tokens, 1, 4)
        with torch._C.DisableTorchFunction():  # as pipeline.py calls the model
            torch.testing.assert_close(compiled(x, cos, sin), rotary.turned(x, cos, sin))
    assert len(seen) == 1, "compiled anew for another number of tokens"
