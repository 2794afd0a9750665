"""AdamW with moments on the host against torch's AdamW: the same bits, wherever the moments are."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from lens_megatron.mcore.host_moments import MomentsOnHost, Visits

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


class _Stream:
    """Notes what it is told to wait for, and which copies were made in it."""

    current: _Stream

    def __init__(self, name: str, noted: list[tuple[str, str]]) -> None:
        self.name, self.noted = name, noted

    def wait_event(self, event: str) -> None:
        self.noted.append((self.name, f"waits for {event}"))

    def wait_stream(self, other: _Stream) -> None:
        self.noted.append((self.name, f"waits for {other.name}"))

    def record_event(self) -> str:
        number = sum(name == self.name and what == "copied" for name, what in self.noted)
        self.noted.append((self.name, "copied"))
        return f"{self.name} {number}"

    def synchronize(self) -> None:
        self.noted.append((self.name, "done"))


def test_visiting_moments_take_turns_in_three_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far ahead the host is: who arrives waits, on the GPU, for the one whose place it takes to have left."""
    noted: list[tuple[str, str]] = []
    compute = _Stream("compute", noted)
    names = iter(("to gpu", "to host"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: _Stream(next(names), noted))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    sizes = [3, 5, 2, 4, 1, 5]
    states = [{name: torch.full((size,), float(size)) for name in ("exp_avg", "exp_avg_sq")} for size in sizes]
    visits, storages = Visits(states, torch.device("cpu")), set()
    for size in sizes:
        moments = visits.arrived()
        assert [moment.tolist() for moment in moments] == [[float(size)] * size] * 2
        storages |= {moment.untyped_storage().data_ptr() for moment in moments}
        for moment in moments:
            moment += 1
        visits.leave()
    visits.finish()
    assert len(storages) == 2 * 3
    assert all((state["exp_avg"] == size + 1).all() for state, size in zip(states, sizes, strict=True))
    assert noted[-1] == ("to host", "done")
    arriving = [what for name, what in noted if name == "to gpu"]
    waits = [f"waits for to host {number}" for number in range(3)]
    expected = ["waits for compute", *["copied"] * 3]
    for wait in waits:
        expected += [wait, "copied"]
    assert arriving == expected
    used = [what for name, what in noted if name == "compute"]
    assert used == [f"waits for to gpu {number}" for number in range(len(sizes))]
