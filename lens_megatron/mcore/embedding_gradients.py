"""How much each prompt token's embedding matters: the gradient-based rival of interference scores (the paper's Table 6)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.mcore.batch import PackedBatch, flat_offsets, own_places
from lens_megatron.mcore.logprobs import share_from_stage
from lens_megatron.mcore.model import innermost
from lens_megatron.mcore.packing import Pack
from lens_megatron.mcore.pipeline import forward_backward, plan_for_this_layout
from lens_megatron.mcore.runtime import cuda_literals
from lens_megatron.mcore.step import Trainable


def embedding_gradient_norms(
    policy: Trainable, sequences: Sequence[Tensor], tokens_per_microbatch: int
) -> list[Tensor]:
    """For each prompt the norm of d(-log p(prompt)) / d(embedding of token t): one backward pass of the sharded model.

    Leaves the gradient buffers dirty; the next training step clears them.
    """
    packs = plan_for_this_layout([len(s) for s in sequences], tokens_per_microbatch, policy.config)
    offsets = flat_offsets(sequences)
    norms_F = torch.zeros(offsets[-1])
    first = innermost(policy.chunks[0])
    waiting: deque[Pack] = deque()  # packs reach the first stage's embedding in order

    def keep_norms(gradient: Tensor, place_T: Tensor) -> None:
        norms_T = _whole_sequence(gradient.squeeze(1), policy.config.sequence_parallel).float().norm(dim=-1).cpu()
        norms_F[place_T[place_T >= 0]] = norms_T[place_T >= 0]

    def on_embedding(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        place_T = own_places(waiting.popleft(), offsets)
        output.register_hook(lambda gradient: keep_norms(gradient, place_T))

    def negative_log_likelihood(output_2T: Tensor, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return -torch.where(batch.target_T >= 0, output_2T[0], 0.0).sum(), {}

    with cuda_literals():
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
    hook = None
    if first.pre_process:
        first.before_pack = waiting.append
        hook = first.embedding.register_forward_hook(on_embedding)
    try:
        forward_backward(policy.chunks, policy.config, packs, sequences, 1.0, negative_log_likelihood)
    finally:
        if hook is not None:
            hook.remove()
            del first.before_pack
    norms_F = share_from_stage(norms_F, parallel_state.get_pipeline_model_parallel_first_rank())
    return list(norms_F.split([len(sequence) for sequence in sequences]))


def _whole_sequence(gradient_TH: Tensor, sequence_parallel: bool) -> Tensor:
    """With sequence parallelism each tensor-parallel rank has a stretch of this rank's tokens."""
    if not sequence_parallel:
        return gradient_TH
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(gradient_TH) for _ in range(group.size())]
    dist.all_gather(parts, gradient_TH.contiguous(), group=group)
    return torch.cat(parts)
