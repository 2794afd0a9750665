"""One pass of a batch through Megatron's pipeline schedule (plain, 1F1B or interleaved), forward only or with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lens_megatron.mcore.batch import PackedBatch, flat_offsets, pack_tensors
from lens_megatron.mcore.model import HeadRequest, innermost
from lens_megatron.mcore.packing import Pack, plan_packs
from lens_megatron.mcore.runtime import cuda_literals

# (log p and entropy [2, T], the pack) -> what this micro-batch leaves behind; and, when training, its loss.
Collect = Callable[[Tensor, PackedBatch], Any]
Loss = Callable[[Tensor, PackedBatch], tuple[Tensor, Any]]


def plan_for_this_layout(lengths: Sequence[int], budget: int, config: Any) -> list[Pack]:
    """The packs of this data-parallel rank."""
    stages = config.virtual_pipeline_model_parallel_size or 1
    plan = plan_packs(
        lengths,
        budget,
        dp=parallel_state.get_data_parallel_world_size(),
        cp=config.context_parallel_size,
        tp=config.tensor_model_parallel_size,
        # the interleaved schedule takes micro-batches in rounds of one per pipeline rank
        multiple=config.pipeline_model_parallel_size if stages > 1 else 1,
    )
    return plan[parallel_state.get_data_parallel_rank()]


def forward_only(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    packs: Sequence[Pack],
    sequences: Sequence[Tensor],
    temperature: float,
    collect: Collect,
    entropy: bool = True,
) -> list[Any]:
    """`collect`'s results of every pack, on the last stage; an empty list on the others."""
    with torch.no_grad():
        return _run(chunks, config, packs, sequences, temperature, collect, training=False, entropy=entropy)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    packs: Sequence[Pack],
    sequences: Sequence[Tensor],
    temperature: float,
    loss: Loss,
) -> list[Any]:
    """Gradients into the chunks' buffers, summed over micro-batches and ranks; the loss's second results."""
    return _run(chunks, config, packs, sequences, temperature, loss, training=True, entropy=True)


def _run(
    chunks: Sequence[torch.nn.Module],
    config: Any,
    packs: Sequence[Pack],
    sequences: Sequence[Tensor],
    temperature: float,
    consume: Callable[[Tensor, PackedBatch], Any],
    training: bool,
    entropy: bool,
) -> list[Any]:
    def forward_step(batches: Iterator[tuple[Pack, PackedBatch]], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        pack, batch = next(batches)
        before_pack = getattr(innermost(chunk), "before_pack", None)  # set while routing.py records or replays
        if before_pack is not None:
            before_pack(pack)
        # our modules use no CUDA literals: without the CPU mode a tiny step takes half the time
        with torch._C.DisableTorchFunction():
            output = chunk(
                batch.tokens_1T,
                batch.position_ids_1T,
                None,
                labels=HeadRequest(batch.labels_T, temperature, entropy) if innermost(chunk).post_process else None,
                packed_seq_params=batch.packed,
            )

        def consume_output(output_2T: Tensor, non_loss_data: bool = False) -> Any:
            if not training:
                return consume(output_2T, batch)
            loss, data = consume(output_2T, batch)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), data

        return output, consume_output

    offsets = flat_offsets(sequences)
    iterators = [((pack, pack_tensors(pack, sequences, offsets)) for pack in packs) for _ in chunks]
    for chunk in chunks:
        chunk.train(training)
    with cuda_literals():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(packs),
            seq_length=max(pack.tokens for pack in packs),
            micro_batch_size=1,
            forward_only=not training,
            collect_non_loss_data=not training,
        )
