"""`memory:` and `optimizer:` of RUN.yaml. Without Megatron, whose import takes longer than reading a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

HeadKind = Literal["torch", "triton"]
Recompute = Literal["none", "light", "selective", "full"]


@dataclass(frozen=True)
class MemoryConfig:
    """`memory:` of RUN.yaml. What is computed again or kept on the host instead of held on the GPU."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    recompute: Recompute = "none"  # activations
    offload_optimizer: float = 0.0  # share of Adam's moments that live on the host and visit the GPU for the update
    offload_reference: bool = True  # the reference lives on the host between uses
    # the vocabulary's logits are never held whole: in chunks by torch, or by fused triton kernels (unmeasured on a GPU)
    head: HeadKind = "torch"
    residual_gib: float = 4.0  # most that the trainer may keep of its GPU while a colocated engine generates

    def __post_init__(self) -> None:
        if not 0.0 <= self.offload_optimizer <= 1.0:
            raise ValueError(f"offload_optimizer is a share between 0 and 1 (got {self.offload_optimizer})")


@dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer:` of RUN.yaml. AdamW; norms and biases are not decayed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    lr: float = 1.0e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    clip_grad: float = 1.0  # global norm; 0 turns clipping off
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: int | None = None  # for linear and cosine; default: all the steps of the run
    min_lr: float = 0.0
    # torch's AdamW as one kernel; default: on CUDA. Where Transformer Engine is installed its Adam is used, which always is
    fused: bool | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0 (got {self.lr})")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must lie between 0 and lr (got {self.min_lr})")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps={self.decay_steps} must be above warmup_steps={self.warmup_steps}")
