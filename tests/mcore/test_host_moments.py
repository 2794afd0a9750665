"""AdamW with moments on the host against torch's AdamW: the same bits, wherever the moments are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lens_megatron.mcore.host_moments import MomentsOnHost

SHAPES = [(5, 3), (40,), (8, 8), (1,)]
OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def groups(where: str, fused: bool) -> list[dict[str, Any]]:
    """One decayed, one not, as Megatron-Core makes them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(where)) for shape in SHAPES]
    common = {"fused": fused, "foreach": False}
    return [{"params": parameters[:2], **common}, {"params": parameters[2:], "weight_decay": 0.0, **common}]


def adam(where: str = "cpu", fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(where, fused), **OPTIONS)


def trained(optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if (step, number) == (1, 2):
                parameter.grad = None  # a part that this rank does not own
        optimizer.step()
    return [p.detach().cpu() for p in parameters]


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(
    "where",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
def test_the_same_bits_as_without(where: str, share: float) -> None:
    fused = where == "cuda"
    expected = trained(adam(where, fused), 5)
    ours = MomentsOnHost(adam(where, fused), share, pinned=fused)
    for found, right in zip(trained(ours, 5), expected, strict=True):
        assert torch.equal(found, right)
    if where == "cuda":
        devices = {state["exp_avg"].device.type for state in ours.state.values()}
        assert devices == ({"cpu"} if share == 1.0 else {"cpu", "cuda"})


def test_the_share_is_of_elements_in_whole_parameters() -> None:
    ours = MomentsOnHost(adam(), 0.5, pinned=False)
    parameters = [p for group in ours.param_groups for p in group["params"]]
    # 15 + 40 of 120 elements are fewer than half; with the third parameter they are more
    assert [id(p) in ours._at_home for p in parameters] == [True, True, True, False]


def test_the_groups_stay_those_that_a_schedule_moves() -> None:
    plain = adam()
    given = plain.param_groups
    ours = MomentsOnHost(plain, 1.0, pinned=False)
    assert all(a is b for a, b in zip(ours.param_groups, given, strict=True))
    given[0]["lr"] = 0.0
    before = [p.detach().clone() for p in given[0]["params"]]
    trained(ours, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, given[0]["params"], strict=True))
