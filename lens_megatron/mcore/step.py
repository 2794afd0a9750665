"""A policy that can be trained and a reference that only scores: built from an HF folder in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.mcore.batch import PackedBatch
from lens_megatron.mcore.hf_bridge import export_hf, load_hf, take_export
from lens_megatron.mcore.hf_files import check_folder
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.mcore.logprobs import TokenScores, score_sequences
from lens_megatron.mcore.model import build_chunks, transformer_config
from lens_megatron.mcore.optimizer import Optimizer, build_optimizer, with_gradient_buffers
from lens_megatron.mcore.pipeline import forward_backward, plan_for_this_layout
from lens_megatron.mcore.runtime import cuda_literals, device
from lens_megatron.mcore.settings import MemoryConfig, OptimizerConfig
from lens_megatron.mcore.watch import MARGIN_S
from lens_megatron.model_spec import ModelSpec
from lens_megatron.precision import torch_dtype

T = TypeVar("T")

# (log-probs [T], entropies [T], the pack) -> this micro-batch's share of the loss, and metrics to be summed.
LossFunction = Callable[[Tensor, Tensor, PackedBatch], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class ShardedModel:
    """This rank's part of a model. Scores sequences; every rank calls, every rank gets the answer."""

    spec: ModelSpec
    config: Any
    chunks: list[torch.nn.Module]

    def score(
        self,
        sequences: Sequence[Tensor],
        tokens_per_microbatch: int,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> TokenScores:
        return score_sequences(
            self.chunks,
            self.config,
            sequences,
            tokens_per_microbatch=tokens_per_microbatch,
            temperature=temperature,
            entropy=entropy,
        )

    def export_hf(self, limit_s: float | None = None) -> Iterator[tuple[str, Tensor]]:
        """HF-named tensors, on rank 0's host; every rank must iterate. `limit_s`: a part's turn comes when those before it
        are taken."""
        return export_hf(self.chunks, self.spec, limit_s)

    def export_hf_to(
        self,
        take: Callable[[Iterator[tuple[str, Tensor]]], T],
        what: str,
        silence_s: float,
        limit_s: float = 3600.0,
    ) -> T:
        """`take` gets them on rank 0 and has `limit_s`; its result, or its error, on every rank. `silence_s`: without rank
        0's sign of life."""
        # sends give up after the watch, which knows whom the others wait for
        tensors = self.export_hf(limit_s + 2 * MARGIN_S)
        return take_export(tensors, take, what, silence_s, limit_s)


@dataclass
class Trainable(ShardedModel):
    """A policy: a sharded model with gradient buffers and an optimizer."""

    optimizer: Optimizer


@dataclass(frozen=True)
class StepResult:
    grad_norm: float
    learning_rate: float
    updated: bool  # False: the gradient was not finite and nothing changed
    metrics: dict[str, float]


def _loaded(
    spec: ModelSpec, layout: ParallelConfig, folder: Path, memory: MemoryConfig, dtype: torch.dtype | None
) -> tuple[Any, list[torch.nn.Module]]:
    check_folder(folder, spec)
    config = transformer_config(spec, layout, dtype or torch_dtype(), memory)
    chunks = build_chunks(spec, config, memory)
    load_hf(chunks, spec, folder)
    return config, chunks


def build_frozen(
    spec: ModelSpec,
    layout: ParallelConfig,
    folder: Path,
    memory: MemoryConfig | None = None,
    dtype: torch.dtype | None = None,
) -> ShardedModel:
    """A model that only scores."""
    config, chunks = _loaded(spec, layout, folder, memory or MemoryConfig(), dtype)
    for chunk in chunks:
        chunk.requires_grad_(False)
    return ShardedModel(spec, config, chunks)


def build_trainable(
    spec: ModelSpec,
    layout: ParallelConfig,
    folder: Path,
    optimizer: OptimizerConfig,
    *,
    steps: int,
    memory: MemoryConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Trainable:
    memory = memory or MemoryConfig()
    config, chunks = _loaded(spec, layout, folder, memory, dtype)
    wrapped = with_gradient_buffers(chunks, config, layout.overlap_grad_reduce)
    return Trainable(spec, config, wrapped, build_optimizer(wrapped, config, optimizer, memory, steps))


def train_step(
    policy: Trainable,
    sequences: Sequence[Tensor],
    loss: LossFunction,
    *,
    tokens_per_microbatch: int,
    temperature: float = 1.0,
    advance_schedule: bool = True,
) -> StepResult:
    """One update from all `sequences`. `loss` must already be divided by global counts: shares are only summed."""
    sums = accumulate_gradients(policy, sequences, loss, tokens_per_microbatch, temperature)
    norm, rate, updated = policy.optimizer.step(advance_schedule)
    return StepResult(norm, rate, updated, sums)


def accumulate_gradients(
    policy: Trainable,
    sequences: Sequence[Tensor],
    loss: LossFunction,
    tokens_per_microbatch: int,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Gradients of the summed loss into the (zeroed) buffers; the summed metrics, on every rank."""
    with cuda_literals():
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        policy.optimizer.inner.zero_grad()

    def share_of_loss(output_2T: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(output_2T[0], output_2T[1], batch)
        return value, {"loss": value.detach(), **metrics}

    packs = plan_for_this_layout([len(sequence) for sequence in sequences], tokens_per_microbatch, policy.config)
    return sum_metrics(forward_backward(policy.chunks, policy.config, packs, sequences, temperature, share_of_loss))


def sum_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Summed over micro-batches and ranks (names ending in /max: the largest), known to every rank."""
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    names = sorted(parts[0]) if last else []
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [names]
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        names = box[0]
    totals: dict[str, float] = {}
    for largest in (False, True):
        chosen = [name for name in names if name.endswith("/max") == largest]
        if not chosen:
            continue
        values = torch.full((len(chosen),), -torch.inf if largest else 0.0, dtype=torch.float64, device=device())
        if last:
            stacked = torch.stack([torch.stack([part[name].double() for name in chosen]) for part in parts])
            values = stacked.amax(0) if largest else stacked.sum(0)
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        dist.all_reduce(values, operation, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        totals.update(zip(chosen, values.tolist(), strict=True))
    return totals
