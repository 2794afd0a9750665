"""HF weights into a sharded model and out of it. In: each rank reads the slices it holds. Out: one tensor at a time."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lens_megatron.errors import RunError
from lens_megatron.mcore import agreement
from lens_megatron.mcore.hf_files import check_folder
from lens_megatron.mcore.hf_names import Mapping, hf_shapes, mapping_of
from lens_megatron.mcore.hf_slices import join_shards, read_shard
from lens_megatron.mcore.model import innermost
from lens_megatron.mcore.rendezvous import from_rank_zero
from lens_megatron.model_spec import ModelSpec

T = TypeVar("T")


@dataclass(frozen=True)
class LocalTensor:
    """A parameter of this rank, and its place among the ranks that share the whole tensor."""

    parameter: Tensor
    mapping: Mapping
    shard: int
    shards: int
    primary: bool  # the one of its replicas that is exported


def local_tensors(chunks: Sequence[torch.nn.Module], spec: ModelSpec) -> Iterator[LocalTensor]:
    """Every parameter of this rank. A tied embedding is met on the first and on the last stage."""
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    expert_ranks = parallel_state.get_expert_model_parallel_world_size()
    first_expert = expert_rank * (spec.moe.experts // expert_ranks) if spec.moe else 0
    for chunk in chunks:
        model = innermost(chunk)
        layer_numbers = {place: layer.layer_number - 1 for place, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            layer, inner = _split_layer(name, layer_numbers)
            mapping = mapping_of(inner, layer, spec, first_expert)
            if mapping.expert is None:
                shard = parallel_state.get_tensor_model_parallel_rank()
                shards = parallel_state.get_tensor_model_parallel_world_size()
                primary = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            else:
                shard = parallel_state.get_expert_tensor_parallel_rank()
                shards = parallel_state.get_expert_tensor_parallel_world_size()
                primary = parallel_state.get_expert_data_parallel_rank() == 0
            if mapping.kind == "whole":
                primary, shard, shards = primary and shard == 0, 0, 1
            tied_copy = spec.tied and inner == "output_layer.weight"
            yield LocalTensor(parameter, mapping, shard, shards, primary and not tied_copy)


def _split_layer(name: str, layer_numbers: dict[int, int]) -> tuple[int | None, str]:
    if not name.startswith("decoder.layers."):
        return None, name
    _, _, place, inner = name.split(".", 3)
    return layer_numbers[int(place)], inner


@torch.no_grad()
def load_hf(chunks: Sequence[torch.nn.Module], spec: ModelSpec, folder: Path) -> None:
    """Fill the model from an HF folder, which is checked first. Reads this rank's slices only."""
    source = check_folder(folder, spec)
    for local in local_tensors(chunks, spec):
        rows = local.parameter.size(0)
        shard = read_shard(local.mapping, spec, local.shard, local.shards, rows, source.read)
        if shard.shape != local.parameter.shape:
            raise RunError(
                f"{folder}: part {local.shard + 1} of {local.shards} of {', '.join(local.mapping.hf_names)} is "
                f"{tuple(shard.shape)} for rank {dist.get_rank()}, its parameter {tuple(local.parameter.shape)}: the files "
                "are as config.json says, so the way from them into this layout is wrong; please report it with the layout"
            )
        local.parameter.copy_(shard)


@dataclass(frozen=True)
class Shard:
    """One rank's part of what a Mapping names, as every rank knows of it."""

    owner: int
    mapping: Mapping
    shards: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Holdings:
    """Who holds what, agreed among all ranks. `order`: the HF names of each gathered unit, in the order of export."""

    mine: dict[tuple[tuple[str, ...], int], LocalTensor]
    shards: dict[tuple[tuple[str, ...], int], Shard]
    order: list[tuple[str, ...]]
    stages: list[int]  # pipeline stage of each rank

    def stage_of(self, names: tuple[str, ...]) -> int:
        return self.stages[self.shards[names, 0].owner]

    def leader_of(self, stage: int) -> int:
        """The rank that gathers and sends a stage's tensors."""
        return self.stages.index(stage)


def agree_on_holdings(chunks: Sequence[torch.nn.Module], spec: ModelSpec) -> Holdings:
    """Every rank must call."""
    mine = {(t.mapping.hf_names, t.shard): t for t in local_tensors(chunks, spec) if t.primary}
    held: list[tuple[int, list[tuple[Mapping, int, int, torch.dtype, tuple[int, ...]]]]] = [(0, [])]
    held *= dist.get_world_size()
    parts = [(t.mapping, t.shard, t.shards, t.parameter.dtype, tuple(t.parameter.shape)) for t in mine.values()]
    dist.all_gather_object(held, (parallel_state.get_pipeline_model_parallel_rank(), parts))
    shards = {
        (mapping.hf_names, number): Shard(owner, mapping, count, dtype, shape)
        for owner, (_, part) in enumerate(held)
        for mapping, number, count, dtype, shape in part
    }
    order = {name: place for place, name in enumerate(hf_shapes(spec))}
    units = sorted({names for names, _ in shards}, key=lambda names: order[names[0]])
    return Holdings(mine, shards, units, [stage for stage, _ in held])


@torch.no_grad()
def gather(
    holdings: Holdings,
    spec: ModelSpec,
    units: Sequence[tuple[str, ...]],
    root: int,
    device: torch.device,
    limit_s: float | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """HF tensors of `units` on `root`, one unit (one expert's gate and up) at a time. Every rank that holds a part must
    iterate, and gets nothing unless it is the root. `limit_s`: of waiting for the other side, on the host; that of the
    processes' group by default."""
    rank = dist.get_rank()
    limits = () if limit_s is None else (datetime.timedelta(seconds=limit_s),)
    for names in units:
        shards: list[Tensor] = []
        for number in range(holdings.shards[names, 0].shards):
            shard = holdings.shards[names, number]
            if shard.owner == rank:
                tensor = holdings.mine[names, number].parameter.detach().to(device)
                if rank != root:
                    _begun(dist.isend(tensor.contiguous(), dst=root)).wait(*limits)
            elif rank == root:
                tensor = torch.empty(shard.shape, dtype=shard.dtype, device=device)
                _begun(dist.irecv(tensor, src=shard.owner)).wait(*limits)
            if rank == root:
                shards.append(tensor)
        if rank != root and device.type == "cuda":
            # waiting for a send waits on the device alone: all of them would be under way, and their time limits run, at once
            torch.cuda.current_stream(device).synchronize()
        if rank == root:
            yield from join_shards(holdings.shards[names, 0].mapping, spec, shards)


def _begun(work: dist.Work | None) -> dist.Work:
    assert work is not None  # torch's way of saying that this rank is not in the group
    return work


def export_hf(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, limit_s: float | None = None
) -> Iterator[tuple[str, Tensor]]:
    """All HF tensors on the host of rank 0, in a fixed order. Every rank must call, and iterate."""
    holdings = agree_on_holdings(chunks, spec)  # at once: rank 0 may have much to do before it wants the first tensor
    return gather(holdings, spec, holdings.order, 0, torch.device("cpu"), limit_s)


def take_export(
    exported: Iterator[tuple[str, Tensor]],
    take: Callable[[Iterator[tuple[str, Tensor]]], T],
    what: str,
    silence_s: float,
    limit_s: float,
) -> T:
    """`take(exported)` on rank 0, in `limit_s`; its result, or its error, on every rank. Every rank calls. Those whose parts
    are gone wait on the store, not in a collective: a large model is written for longer than a collective may last."""

    def taken() -> T:
        try:
            with agreement.limited(limit_s):
                result = take(exported)
        except Exception:
            exhaust(exported)
            raise
        exhaust(exported)
        return result

    if dist.get_rank() != 0:
        exhaust(exported)
    return from_rank_zero(taken, what, silence_s)


def exhaust(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """What is left of a gathering: other ranks are sending it."""
    for _ in tensors:
        pass
