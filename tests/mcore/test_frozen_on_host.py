"""The reference, which lives on the host and visits the device for each use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lens_megatron import prompt_signals
from lens_megatron.mcore.offload import FrozenOnHost

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    chunks = [torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False)]
    for chunk in chunks:
        chunk.requires_grad_(False)
    if not ON_GPU:  # a copy stands for what is on the device
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone())
    return SimpleNamespace(chunks=chunks)


def parameters(model: Any) -> list[torch.Tensor]:
    return [parameter.data for chunk in model.chunks for parameter in chunk.parameters()]


@pytest.mark.parametrize("offloaded", [True, False])
def test_it_visits_the_device_for_each_use(model: Any, offloaded: bool) -> None:
    before = [tensor.clone() for tensor in parameters(model)]
    reference = prompt_signals.Reference(model, "some weights", offloaded)
    at_home = [tensor.data_ptr() for tensor in parameters(model)]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), reference.at_hand() as present:
            for tensor, kept, home in zip(parameters(present), before, at_home, strict=True):
                assert (tensor.data_ptr() != home) is offloaded
                assert torch.equal(tensor.cpu(), kept)
            raise ZeroDivisionError  # it goes back whatever happens
        assert [tensor.data_ptr() for tensor in parameters(model)] == at_home
    assert all(torch.equal(tensor.cpu(), kept) for tensor, kept in zip(parameters(model), before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_it_is_pinned_on_a_machine_with_room(model: Any) -> None:
    FrozenOnHost(model)
    assert all(tensor.is_pinned() for tensor in parameters(model))
