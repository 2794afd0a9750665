"""`memory.offload_optimizer`: AdamW whose moments live on the host and visit the GPU, one parameter at a time.

The arithmetic stays the GPU's, so that weights and moments are the same bits wherever the moments live. A step moves the
moments over the bus once in each direction, the next parameter's arriving while this one is computed. Unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lens_megatron.mcore.moments import MOMENTS, begin_moments

PLACES = 3  # of moments on the GPU


class MomentsOnHost(torch.optim.AdamW):
    """In the place of an AdamW that has not stepped yet, with its very groups: `share` of the parameters' elements have their
    moments on the host, the first ones first."""

    def __init__(self, adam: torch.optim.AdamW, share: float, pinned: bool) -> None:
        # torch refuses what Megatron-Core optimizes, views into flat buffers; set afterwards, as Megatron-Core does, they work
        super().__init__(
            [torch.zeros(1)], **{name: adam.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        )
        self.param_groups = adam.param_groups
        self._pinned = pinned
        self._at_home = {id(parameter) for parameter in _first(adam, share)}

    def first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros where they belong."""
        at_home = id(parameter) in self._at_home
        where = torch.device("cpu") if at_home else parameter.device
        return begin_moments(self, parameter, group, where, at_home and self._pinned)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        updates = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self.first_state(parameter, group) for group, parameter in updates]
        away = [state["exp_avg"].device != p.device for state, (_, p) in zip(states, updates, strict=True)]
        visiting = [state for state, is_away in zip(states, away, strict=True) if is_away]
        visits = Visits(visiting, torch.device("cuda", torch.cuda.current_device())) if visiting else None
        for (group, parameter), state, is_away in zip(updates, states, away, strict=True):
            moments = visits.arrived() if visits and is_away else [state[name] for name in MOMENTS]
            beta1, beta2 = group["betas"]
            adamw(
                [parameter],
                [parameter.grad],
                [moments[0]],
                [moments[1]],
                [],
                [state["step"]],
                foreach=False,
                fused=bool(group["fused"]),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            if visits and is_away:
                visits.leave()
        if visits:
            visits.finish()


class Visits:
    """Moments on the GPU, one parameter's after another's: one pair arrives while one is in use and one leaves. They take turns
    in three places made at the start. The host is far ahead of the bus: memory for each as it comes would add up to all."""

    def __init__(self, states: Sequence[dict[str, Tensor]], where: torch.device) -> None:
        self._states = states
        largest = max(state[name].numel() for state in states for name in MOMENTS)
        count = min(PLACES, len(states))
        self._places = [[torch.empty(largest, device=where) for _ in MOMENTS] for _ in range(count)]
        self._to_gpu, self._to_host = torch.cuda.Stream(), torch.cuda.Stream()
        self._to_gpu.wait_stream(torch.cuda.current_stream())  # what was in these places before may still be read
        self._there: list[Any] = []  # events, by parameter
        self._left: list[Any] = []
        self._send(0)

    def arrived(self) -> list[Tensor]:
        """The next parameter's; the one after it sets out."""
        number = len(self._left)
        self._send(number + 1)
        torch.cuda.current_stream().wait_event(self._there[number])
        return self._at(number)

    def leave(self) -> None:
        """Those that arrived last, once what is in the current stream is done with them."""
        number = len(self._left)
        self._to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to_host):
            for name, here in zip(MOMENTS, self._at(number), strict=True):
                self._states[number][name].copy_(here, non_blocking=True)
            self._left.append(self._to_host.record_event())

    def finish(self) -> None:
        """Whoever reads them on the host next finds them whole."""
        self._to_host.synchronize()

    def _send(self, number: int) -> None:
        if number == len(self._states):
            return
        if number >= len(self._places):
            self._to_gpu.wait_event(self._left[number - len(self._places)])
        with torch.cuda.stream(self._to_gpu):
            for name, here in zip(MOMENTS, self._at(number), strict=True):
                here.copy_(self._states[number][name], non_blocking=True)
            self._there.append(self._to_gpu.record_event())

    def _at(self, number: int) -> list[Tensor]:
        pair = zip(MOMENTS, self._places[number % len(self._places)], strict=True)
        return [place[: (like := self._states[number][name]).numel()].view(like.shape) for name, place in pair]


def host_sizes(adam: torch.optim.Optimizer, share: float) -> list[int]:
    """Bytes of each tensor that would live on the host."""
    return [4 * parameter.numel() for parameter in _first(adam, share) for _ in MOMENTS]


def _first(adam: torch.optim.Optimizer, share: float) -> list[Tensor]:
    """The first parameters, whole ones, until they hold `share` of all elements."""
    parameters: list[Tensor] = [parameter for group in adam.param_groups for parameter in group["params"]]
    wanted, held = share * sum(p.numel() for p in parameters), 0
    chosen: list[Tensor] = []
    for parameter in parameters:
        if held >= wanted:
            break
        chosen.append(parameter)
        held += parameter.numel()
    return chosen
