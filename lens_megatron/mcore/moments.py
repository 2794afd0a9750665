"""Adam's moments as they are before the first update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_torch_adam(inner: Any) -> bool:
    """Not Transformer Engine's, which counts its updates in its groups and knows one way to compute them."""
    return isinstance(inner, torch.optim.AdamW | torch.optim.Adam)


def begin_moments(
    adam: Any, parameter: Tensor, group: dict[str, Any], where: torch.device, pinned: bool = False
) -> dict[str, Tensor]:
    """The parameter's state, made of zeros if it has none: with them the first update is the same as without."""
    state: dict[str, Tensor] = adam.state[parameter]
    if "exp_avg" not in state:
        for name in MOMENTS:
            state[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=where, pin_memory=pinned)
        if is_torch_adam(adam):
            # one fused kernel counts on the GPU, the others on the host
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu")
    return state
