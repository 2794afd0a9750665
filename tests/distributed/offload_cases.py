"""What runs on every rank for test_offload.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed.cases import start


def _update(policy: Any, seed: int) -> None:
    from lens_megatron.mcore.step import train_step

    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, 125, (15,), generator=generator) for _ in range(4)]

    def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
        return -(logprobs_T * (pack.target_T >= 0)).sum() / 56, {}

    train_step(policy, sequences, loss, tokens_per_microbatch=64)


def train(folder: Path, layout: ParallelConfig, dtype: torch.dtype, leaves: bool) -> tuple[dict[str, Tensor], Any]:
    """Weights of this rank after three updates; bytes of its weights, bytes freed, bytes left while it was away."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from lens_megatron.mcore.offload import Residence
    from lens_megatron.mcore.optimizer import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable

    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(lr=1e-2), steps=9, dtype=dtype)
    held = sum(p.numel() * p.element_size() for chunk in policy.chunks for p in chunk.parameters())
    residence, report = Residence(policy), None
    for seed in range(3):
        _update(policy, seed)
        if leaves:
            with patch("lens_megatron.mcore.offload.PIECE_BYTES", 1001):  # one that divides nothing
                assert RotaryEmbedding.forward.cache_info().currsize > 0  # made by the update
                freed = residence.release()
                assert RotaryEmbedding.forward.cache_info().currsize == 0  # nothing keeps a piece of memory for it
                assert not parallel_state.get_global_memory_buffer().buffer
                assert residence.release() == 0  # twice is once
                left = sum(p.untyped_storage().nbytes() for chunk in policy.chunks for p in chunk.parameters())
                report = (held, freed, left)
                residence.restore()
    weights = {
        f"{n}.{name}": p.detach().clone() for n, c in enumerate(policy.chunks) for name, p in c.named_parameters()
    }
    return weights, report


def by_stage(folder: Path, layout: ParallelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The whole export (rank 0's), this rank's as leader of its stage, and what was planned for the stage."""
    from lens_megatron.mcore.hf_bridge import agree_on_holdings
    from lens_megatron.mcore.step import build_frozen
    from lens_megatron.rollout.weight_sync.config import SyncConfig
    from lens_megatron.rollout.weight_sync.delivery import Delivery

    spec = start(folder, layout)
    model = build_frozen(spec, layout, folder, dtype=torch.float32)
    whole = dict(model.export_hf())
    holdings = agree_on_holdings(model.chunks, spec)
    delivery = Delivery(0, holdings, spec, SyncConfig(), ())
    stage = holdings.stages[dist.get_rank()]
    part = dict(delivery.tensors(stage, holdings.leader_of(stage), torch.device("cpu")))
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in delivery.described(stage)}
    return whole, part, planned


def delivered_slowly(folder: Path, layout: ParallelConfig, pause_s: float) -> int:
    """How many tensors rank 0 got, which took its time over the first."""
    from lens_megatron.mcore.hf_bridge import agree_on_holdings
    from lens_megatron.mcore.step import build_frozen
    from lens_megatron.rollout.weight_sync.config import SyncConfig
    from lens_megatron.rollout.weight_sync.delivery import Delivery

    spec = start(folder, layout)
    model = build_frozen(spec, layout, folder, dtype=torch.float32)
    delivery = Delivery(0, agree_on_holdings(model.chunks, spec), spec, SyncConfig(), ())
    taken = 0
    for _ in delivery.tensors(None, 0, torch.device("cpu")):
        if taken == 0:
            time.sleep(pause_s)
        taken += 1
    return taken
