"""Operations that run as one kernel on CUDA, and keep only what that kernel keeps, where the fake device would run many.

RMSNorm has a kernel of torch's own there; SwiGLU and rotary embeddings are one by torch.compile; the head is Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _norm_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _swiglu(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


def install(head: Callable[[str, float], None]) -> None:
    """`head` hears of the head's passes: name and FLOPs."""
    _install_layers()
    _install_head(head)


@cache
def _install_layers() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    from lens_megatron.mcore import rotary

    norm, norm_backward = _operation(_norm), _operation(_norm_backward)

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            result, scale = norm(x, weight)
            ctx.save_for_backward(x, weight, scale)
            return result

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return norm_backward(gradient, *ctx.saved_tensors)

    torch.nn.RMSNorm.forward = lambda self, x: Norm.apply(x, self.weight)  # type: ignore[method-assign]
    swiglu, swiglu_backward, turn = _operation(_swiglu), _operation(_swiglu_backward), _operation(_rotary)
    fused_bias_swiglu.swiglu = swiglu
    fused_bias_swiglu.swiglu_back = swiglu_backward
    rotary._one_kernel = lambda: turn  # type: ignore[assignment]


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    operation = torch.library.custom_op(f"fused::{function.__name__.strip('_')}", function, mutates_args=())
    operation.register_fake(function)
    return operation


def _install_head(heard: Callable[[str, float], None]) -> None:
    """The Triton head's memory: vectors of a token forward, its scratch backward. Its kernels are launched by nobody."""
    from lens_megatron.mcore import head, head_triton

    def statistics(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
        heard("head forward", 2.0 * hidden.size(0) * hidden.size(1) * weight.size(0))
        return tuple(hidden.new_zeros(hidden.size(0), dtype=torch.float32) for _ in range(4))

    def gradients(hidden: Tensor, weight: Tensor, *rest: Any) -> None:
        heard("head backward", 6.0 * hidden.size(0) * hidden.size(1) * weight.size(0))  # its logits once more
        torch.empty(head_triton._SCRATCH, dtype=torch.uint8, device=hidden.device)
        for gradient in rest[-2:]:
            if gradient is not None:
                gradient.zero_()

    head_triton.statistics, head_triton.gradients = statistics, gradients  # type: ignore[assignment]
    head.choose_walk = lambda kind, hidden: head_triton  # type: ignore[assignment]
