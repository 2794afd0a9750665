"""RMSNorm in plain torch, for the local layer spec."""

from __future__ import annotations

from typing import Any

import torch


class PlainRMSNorm(torch.nn.RMSNorm):
    """Megatron-Core's torch norm refuses sequence parallelism, which only needs this mark on the weight.

    The mark tells finalize_model_grads to sum the gradient over the tensor-parallel ranks; without it the norms' weights
    drift apart silently.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
