"""`memory.offload_optimizer`: AdamW whose moments live on the host and visit the GPU, one parameter at a time.

The arithmetic stays the GPU's, so that weights and moments are the same bits wherever the moments live. A step moves the
moments over the bus once in each direction, the next parameter's arriving while this one is computed. Unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lens_megatron.mcore.moments import MOMENTS, begin_moments


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
        self._ways: tuple[Any, Any] | None = None  # streams: to the GPU, back to the host

    def first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Zeros where they belong."""
        at_home = id(parameter) in self._at_home
        where = torch.device("cpu") if at_home else parameter.device
        return begin_moments(self, parameter, group, where, at_home and self._pinned)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        visits = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        arriving = self._arrive(*visits[0]) if visits else None
        for number, (group, parameter) in enumerate(visits):
            here = arriving
            arriving = self._arrive(*visits[number + 1]) if number + 1 < len(visits) else None
            assert here is not None
            moments = here()
            beta1, beta2 = group["betas"]
            adamw(
                [parameter],
                [parameter.grad],
                [moments[0]],
                [moments[1]],
                [],
                [self.state[parameter]["step"]],
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
            self._leave(parameter, moments)
        if self._ways is not None:
            self._ways[1].synchronize()  # whoever reads them on the host next finds them whole

    def _arrive(self, group: dict[str, Any], parameter: Tensor) -> Callable[[], list[Tensor]]:
        """Their way begins; the answer waits for its end."""
        state = self.first_state(parameter, group)
        if state["exp_avg"].device == parameter.device:
            return lambda: [state[name] for name in MOMENTS]
        to_gpu, _ = self._streams()
        with torch.cuda.stream(to_gpu):
            moments = [state[name].to(parameter.device, non_blocking=True) for name in MOMENTS]
            there = to_gpu.record_event()

        def arrived() -> list[Tensor]:
            torch.cuda.current_stream().wait_event(there)
            for moment in moments:
                moment.record_stream(torch.cuda.current_stream())
            return moments

        return arrived

    def _leave(self, parameter: Tensor, moments: list[Tensor]) -> None:
        state = self.state[parameter]
        if state["exp_avg"].device == parameter.device:
            return
        _, to_host = self._streams()
        to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(to_host):
            for name, moment in zip(MOMENTS, moments, strict=True):
                state[name].copy_(moment, non_blocking=True)
                moment.record_stream(to_host)

    def _streams(self) -> tuple[Any, Any]:
        if self._ways is None:
            self._ways = torch.cuda.Stream(), torch.cuda.Stream()
        return self._ways


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
