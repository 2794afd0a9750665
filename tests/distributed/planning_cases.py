"""What real ranks allocate, counted: buffers, optimizer state, and the saved tensors of a forward and backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import cases, reference


@dataclass(frozen=True)
class Allocated:
    stage: int
    data_rank: int  # among the ranks that dense gradients are reduced over
    expert_rank: int
    weights: int
    gradients: int
    main_weights: int
    moments: int
    step_counts: int
    kept: int  # the most bytes of saved tensors that lived at once
    packs: list[tuple[int, tuple[int, ...]]]  # tokens and padded lengths of each micro-batch


class Handle:
    """In the graph instead of a saved tensor: when the graph lets go of it, the tensor is no longer kept."""

    def __init__(self, tensor: Tensor, living: LivingStorages) -> None:
        self.tensor, self.living = tensor, living
        self.key = living.enter(tensor)

    def __del__(self) -> None:
        self.living.leave(self.key)


class LivingStorages:
    def __init__(self, without: set[int]) -> None:
        self.without = without
        self.uses: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def enter(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.without:
            return 0
        self.uses[key] += 1
        if self.uses[key] == 1:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.most = max(self.most, self.now)
        return key

    def leave(self, key: int) -> None:
        if key:
            self.uses[key] -= 1
            if self.uses[key] == 0:
                self.now -= self.sizes[key]


def allocated(
    folder: Path,
    layout: ParallelConfig,
    sequences: Sequence[Tensor],
    data: reference.LossData,
    budget: int,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    bucket_size: int | None = None,
) -> Allocated:
    """Of one update. `bucket_size`: as on CUDA, where gradients are reduced bucket by bucket."""
    from megatron.core import parallel_state

    from lens_megatron.mcore import optimizer as ours
    from lens_megatron.mcore.model import MemoryConfig, build_chunks, transformer_config
    from lens_megatron.mcore.pipeline import plan_for_this_layout
    from lens_megatron.mcore.step import accumulate_gradients, build_trainable

    spec = cases.start(folder, layout)
    memory = MemoryConfig(recompute=recompute)  # type: ignore[arg-type]
    if bucket_size is not None:
        config = transformer_config(spec, layout, dtype, memory)
        buffers = _bucketed(build_chunks(spec, config, memory), config, bucket_size)
        return _of_buffers(buffers)
    policy = build_trainable(spec, layout, folder, ours.OptimizerConfig(), steps=2, memory=memory, dtype=dtype)
    buffers = [b for chunk in policy.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    living = LivingStorages({b.param_data.untyped_storage().data_ptr() for b in buffers})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Handle(tensor, living), lambda handle: handle.tensor):
        accumulate_gradients(policy, sequences, cases._loss(sequences, data), budget)
    assert living.now == 0, "something was kept after the backward pass"
    policy.optimizer.step()
    parts = ours.optimizer_parts(policy.optimizer.inner)
    main = [p for part in parts for group in part.shard_fp32_from_float16_groups for p in group]
    states = [state for part in parts for state in part.optimizer.state.values()]
    packs = plan_for_this_layout([len(sequence) for sequence in sequences], budget, policy.config)
    return Allocated(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        expert_rank=parallel_state.get_expert_data_parallel_rank(),
        weights=sum(b.param_data.nbytes for b in buffers),
        gradients=sum(b.grad_data.nbytes for b in buffers),
        main_weights=sum(p.untyped_storage().nbytes() for p in main),
        moments=sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
        step_counts=sum(state["step"].nbytes for state in states),
        kept=living.most,
        packs=[(pack.tokens, pack.padded_lengths) for pack in packs],
    )


def _bucketed(chunks: Sequence[torch.nn.Module], config: Any, bucket_size: int) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from lens_megatron.mcore.runtime import cuda_literals

    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=bucket_size
    )
    with cuda_literals():
        wrapped = [
            DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    return [b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _of_buffers(buffers: Sequence[Any]) -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank(), [tuple(b.bucket_indices) for b in buffers]
