"""Checksums of weights and optimizer state that do not depend on how they are cut over ranks.

Of every tensor, each element's bits, read as an integer, times a number of its place in the whole tensor; of all tensors, the
sums times a number of their names; modulo 2^64. One flipped bit always changes it, and so do elements, experts or layers that
changed places; parts add up to the whole in any layout, and zeros (a padded vocabulary's rows) add nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.fingerprints import odd_words, placed_sum
from lens_megatron.mcore.checkpoint_optimizer import owned_ranges
from lens_megatron.mcore.hf_bridge import LocalTensor, local_tensors
from lens_megatron.mcore.optimizer import optimizer_parts
from lens_megatron.mcore.runtime import device
from lens_megatron.mcore.step import ShardedModel, Trainable

SCHEME = 2  # of `state_checksums`: those of another one say nothing about the same state


@torch.no_grad()
def differing_replicas(model: ShardedModel) -> list[str]:
    """HF names of weights that are not bit for bit the same on all ranks that hold the same part. Collective."""
    locals_ = list(local_tensors(model.chunks, model.spec))
    sums = torch.stack([_Place.of(local).sum(local.parameter.detach()) for local in locals_])
    different = torch.zeros(len(locals_), dtype=torch.int64, device=device())
    for mine, group in _groups(locals_, model.spec.tied):
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


def _groups(locals_: Sequence[LocalTensor], tied: bool) -> list[tuple[list[int], Any]]:
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
    if tied and parallel_state.is_rank_in_embedding_group():  # the first stage's embedding is the last one's head
        copies = [place for place in dense if locals_[place].mapping.hf_names == ("model.embed_tokens.weight",)]
        result.append((copies, parallel_state.get_embedding_group()))
    return result


@torch.no_grad()
def state_checksums(policy: Trainable) -> dict[str, int]:
    """Of the weights and of each kind of optimizer state (fp32), whatever the layout. Collective; the same on all ranks."""
    weights = torch.zeros((), dtype=torch.int64, device=device())
    counted: dict[int, _Place] = {}  # parameters whose optimizer state this rank's data-parallel group counts
    for local in local_tensors(policy.chunks, policy.spec):
        if local.primary:
            weights += _Place.of(local).sum(local.parameter.detach())
        if _counts_once(local, policy):
            counted[id(local.parameter)] = _Place.of(local)
    kinds = ("param", "exp_avg", "exp_avg_sq")
    sums = {kind: torch.zeros((), dtype=torch.int64, device=device()) for kind in kinds}
    for part in optimizer_parts(policy.optimizer.inner):
        for parameter, start, _ in owned_ranges(part):
            if (place := counted.get(id(parameter))) is not None:
                states = part._get_main_param_and_optimizer_states(parameter)
                for kind in kinds:
                    if kind in states:
                        sums[kind] += place.sum(states[kind].detach().float(), start)
    totals = torch.stack([weights, *sums.values()])
    dist.all_reduce(totals)
    names = ("weights", *(f"optimizer.{kind}" for kind in kinds))
    return {"scheme": SCHEME, **dict(zip(names, totals.tolist(), strict=True))}


def _counts_once(local: LocalTensor, policy: Trainable) -> bool:
    """One of the tensor-parallel ranks that hold a whole parameter; and of a tied embedding the first stage's."""
    whole = local.mapping.kind == "whole" and local.mapping.expert is None
    if whole and parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    last_tied = policy.spec.tied and getattr(local.parameter, "shared_embedding", False)
    return not (last_tied and not parallel_state.is_pipeline_first_stage(ignore_virtual=True))


@dataclass(frozen=True)
class _Place:
    """Where this rank's part of a tensor lies in the whole: the numbers of its rows and columns, and of its name."""

    row_starts: tuple[int, ...]  # of runs of rows of equal length
    rows: int
    first_column: int
    columns: int
    name: int

    @classmethod
    def of(cls, local: LocalTensor) -> _Place:
        rows = local.parameter.size(0)
        columns = local.parameter.numel() // rows
        starts: tuple[int, ...] = (local.shard * rows,)
        if local.mapping.kind in ("whole", "columns"):
            starts = (0,)
        elif local.mapping.kind == "gate_up":  # the whole is all of gate, then all of up
            starts = (local.shard * rows // 2, (local.shards + local.shard) * rows // 2)
        first_column = local.shard * columns if local.mapping.kind == "columns" else 0
        return cls(starts, rows, first_column, columns, _odd_number(local.mapping.hf_names))

    def sum(self, part: Tensor, start: int = 0) -> Tensor:
        """Of the part's elements from number `start` on; of what lives on the host, too, where the device is fast."""
        part = part.to(device(), non_blocking=True)
        run_R = part.new_empty(self.rows // len(self.row_starts), dtype=torch.int64)
        row_C = part.new_empty(self.columns, dtype=torch.int64)
        rows_R = torch.cat([odd_words(run_R, 1, first) for first in self.row_starts])
        return placed_sum(part, rows_R, odd_words(row_C, 2, self.first_column) << 1, start) * self.name


def _odd_number(names: Sequence[str]) -> int:
    digest = hashlib.blake2b("|".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) | 1
