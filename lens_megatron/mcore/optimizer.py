"""Gradient buffers, the distributed optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import local_multi_tensor_l2_norm

from lens_megatron.errors import UsageError
from lens_megatron.mcore.host_moments import MomentsOnHost, host_sizes
from lens_megatron.mcore.moments import is_torch_adam
from lens_megatron.mcore.pinning import may_pin
from lens_megatron.mcore.runtime import cuda_literals
from lens_megatron.mcore.settings import MemoryConfig, OptimizerConfig


@dataclass
class Optimizer:
    """Megatron-Core's optimizer and scheduler, stepped together."""

    inner: Any
    scheduler: OptimizerParamScheduler

    def step(self, advance_schedule: bool = True) -> tuple[float, float, bool]:
        """Gradient norm before clipping, learning rate used, and whether the weights changed.

        The schedule counts steps of the run: of several updates in one step, only one advances it.

        A gradient that is not finite changes nothing: neither weights, nor moments, nor the schedule.
        """
        with cuda_literals(), torch.no_grad():
            overflow = self.inner.prepare_grads()
            norm = float(self.inner.get_grad_norm())
            if overflow or not math.isfinite(norm):
                return norm, self.learning_rate(), False
            # The schedule moves first: with warm-up over w steps, the first step takes lr/w, not 0.
            self.scheduler.step(increment=int(advance_schedule))
            for part in optimizer_parts(self.inner):
                gradients = [p.grad for p in part.get_parameters() if p.grad is not None]
                share = part.config.clip_grad / (norm + 1e-6)
                if 0 < share < 1 and gradients:
                    torch._foreach_mul_(gradients, share)
            self.inner.step_with_ready_grads()
        return norm, self.learning_rate(), True

    def norm(self) -> float:
        """Of the gradients in the buffers, over all ranks; nothing is changed by it."""
        with cuda_literals(), torch.no_grad():
            self.inner.prepare_grads()
            return float(self.inner.get_grad_norm())

    def learning_rate(self) -> float:
        return max((float(group["lr"]) for group in self.inner.param_groups), default=0.0)


def optimizer_parts(inner: Any) -> list[Any]:
    """Those that Megatron-Core chained, of dense parameters and of experts. Not the stubs of a rank that has nothing of the
    kind to train: they hold no optimizer, no state and no gradients, and are there for collectives alone."""
    parts = getattr(inner, "chained_optimizers", [inner])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def with_gradient_buffers(
    chunks: Sequence[torch.nn.Module], config: Any, overlap_grad_reduce: bool = True
) -> list[torch.nn.Module]:
    """The chunks wrapped for data parallelism; `config` learns how gradients are summed and finished."""
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap = overlap_grad_reduce and ranks > 1 and can_overlap()
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        # Weights leave for the engine right after a step, so there is no later forward pass to hide the gather behind.
        overlap_param_gather=False,
    )
    with cuda_literals():
        wrapped = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if overlap:
        config.grad_sync_func = (
            [chunk.start_grad_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].start_grad_sync
        )
    config.finalize_model_grads_func = _finish_gradients
    return wrapped


def can_overlap() -> bool:
    """On CPU a reduction would only take the cores that backward needs."""
    return torch.cuda.is_available()


def _finish_gradients(chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Sums only: the loss was divided by the global counts before the batch was cut, so nothing is divided here."""
    finalize_model_grads(chunks, None, **options)


def build_optimizer(
    wrapped: Sequence[torch.nn.Module], config: Any, settings: OptimizerConfig, memory: MemoryConfig, steps: int
) -> Optimizer:
    mcore = McoreOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # neither Transformer Engine nor apex
        clip_grads.l2_norm_impl = _norm_on_the_device
    with cuda_literals():
        inner = get_megatron_optimizer(mcore, list(wrapped), config_overrides=get_standard_config_overrides(mcore))
        if memory.offload_optimizer > 0:
            _moments_to_host(inner, memory.offload_optimizer)
        _set_fused(inner, settings.fused)
        # one more than the run has, or its last step would train at min_lr, and a run of one step not at all
        decay_steps = (settings.decay_steps or max(steps, settings.warmup_steps)) + 1
        scheduler = OptimizerParamScheduler(
            inner,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
    config.grad_scale_func = inner.scale_loss
    return Optimizer(inner, scheduler)


def _norm_on_the_device(
    chunk_size: int, overflow: Any, lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Instead of Megatron-Core's own norm, which fetches one number a parameter from the GPU and waits for each."""
    return torch.nn.utils.get_total_norm(list(lists[0])).view(1), None


def _moments_to_host(inner: Any, share: float) -> None:
    """Megatron-Core's own way, its hybrid optimizer, wants a path of its own and loses weights that are loaded into it."""
    for part in optimizer_parts(inner):
        pinned = may_pin(host_sizes(part.optimizer, share))
        part.optimizer = MomentsOnHost(part.optimizer, share, pinned)


def _set_fused(inner: Any, fused: bool | None) -> None:
    """Megatron-Core constructs torch's AdamW without a word about it; the groups can still be told."""
    for part in optimizer_parts(inner):
        if is_torch_adam(part.optimizer):
            wanted = torch.cuda.is_available() if fused is None else fused
            for group in part.optimizer.param_groups:
                group.update(fused=wanted, foreach=False if wanted else group.get("foreach"))
        elif fused is False:
            raise UsageError("optimizer.fused: Transformer Engine's Adam knows no other way: leave it out")
