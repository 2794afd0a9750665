"""Checksums of weights and optimizer state that do not depend on how they are cut over ranks.

The checksum of a tensor is the sum of its elements' bits, read as integers, modulo 2^64: one flipped bit always changes it,
parts add up to the whole in any layout, and zeros (a padded vocabulary's rows) add nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.guards.bits import bit_sum
from lens_megatron.mcore.checkpoint_optimizer import optimizer_parts, owned_ranges
from lens_megatron.mcore.hf_bridge import LocalTensor, local_tensors
from lens_megatron.mcore.runtime import device
from lens_megatron.mcore.step import ShardedModel, Trainable


@torch.no_grad()
def differing_replicas(model: ShardedModel) -> list[str]:
    """HF names of weights that are not bit for bit the same on all ranks that hold the same part. Collective."""
    locals_ = list(local_tensors(model.chunks, model.spec))
    sums = torch.stack([bit_sum(local.parameter.detach()).to(device()) for local in locals_])
    different = torch.zeros(len(locals_), dtype=torch.int64, device=device())
    for mine, group in _groups(locals_):
        if group.size() > 1:
            chosen = torch.tensor(mine, dtype=torch.long, device=device())
            highest, lowest = sums[chosen], sums[chosen]
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
            different[chosen] |= (highest != lowest).long()
    found = [locals_[place].mapping.hf_names[0] for place in different.nonzero().flatten().tolist()]
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    if int(_largest(different)):  # names travel only when there is something to tell
        dist.all_gather_object(everyone, found)
    return sorted({name for part in everyone for name in part})


def _largest(different: Tensor) -> Tensor:
    worst = different.max() if len(different) else torch.zeros((), dtype=torch.int64, device=device())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst


def _groups(locals_: Sequence[LocalTensor]) -> list[tuple[list[int], Any]]:
    """Which of this rank's parameters each group of ranks holds alike. Every rank of a group has the same list."""
    dense = [place for place, local in enumerate(locals_) if local.mapping.expert is None]
    experts = [place for place, local in enumerate(locals_) if local.mapping.expert is not None]
    whole = [place for place in dense if locals_[place].mapping.kind == "whole"]
    result: list[tuple[list[int], Any]] = []
    if dense:
        result.append((dense, parallel_state.get_data_parallel_group(with_context_parallel=True)))
    if experts:
        result.append((experts, parallel_state.get_expert_data_parallel_group()))
    if whole:
        result.append((whole, parallel_state.get_tensor_model_parallel_group()))
    return result


@torch.no_grad()
def state_checksums(policy: Trainable) -> dict[str, int]:
    """Of the weights and of each kind of optimizer state (fp32), whatever the layout. Collective; the same on all ranks."""
    weights = torch.zeros((), dtype=torch.int64, device=device())
    counted: set[int] = set()  # parameters whose optimizer state this rank's data-parallel group counts
    for local in local_tensors(policy.chunks, policy.spec):
        if local.primary:
            weights += bit_sum(local.parameter.detach()).to(device())
        if _counts_once(local, policy):
            counted.add(id(local.parameter))
    kinds = ("param", "exp_avg", "exp_avg_sq")
    sums = {kind: torch.zeros((), dtype=torch.int64, device=device()) for kind in kinds}
    for part in optimizer_parts(policy.optimizer):
        for parameter, _, _ in owned_ranges(part):
            if id(parameter) in counted:
                states = part._get_main_param_and_optimizer_states(parameter)
                for kind in kinds:
                    if kind in states:
                        sums[kind] += bit_sum(states[kind].detach().float()).to(device())
    totals = torch.stack([weights, *sums.values()])
    dist.all_reduce(totals)
    names = ("weights", *(f"optimizer.{kind}" for kind in kinds))
    return dict(zip(names, totals.tolist(), strict=True))


def _counts_once(local: LocalTensor, policy: Trainable) -> bool:
    """One of the tensor-parallel ranks that hold a whole parameter; and of a tied embedding the first stage's."""
    whole = local.mapping.kind == "whole" and local.mapping.expert is None
    if whole and parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    last_tied = policy.spec.tied and getattr(local.parameter, "shared_embedding", False)
    return not (last_tied and not parallel_state.is_pipeline_first_stage(ignore_virtual=True))
