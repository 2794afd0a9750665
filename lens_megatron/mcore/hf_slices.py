"""A Megatron-Core parameter of one rank from slices of HF tensors, and HF tensors from all ranks' parts.

linear_qkv   [q q .. k v] per key/value group, groups cut over tp        linear_fc1   gate and up cut over tp, then joined
linear_proj, linear_fc2   cut by columns over tp                         vocabulary   cut by rows over tp, zeros to pad
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lens_megatron.mcore.hf_names import Mapping
from lens_megatron.model_spec import ModelSpec

# read(name, dim, start, stop): rows (dim 0) or columns (dim 1) of an HF tensor; dim None reads it whole.
Read = Callable[[str, int | None, int, int], Tensor]


def read_shard(mapping: Mapping, spec: ModelSpec, rank: int, ranks: int, local_rows: int, read: Read) -> Tensor:
    """This rank's tensor, from the slices that it needs and no others. `local_rows`: rows of the local tensor."""
    names = mapping.hf_names
    if mapping.kind == "whole":
        return read(names[0], None, 0, 0)
    if mapping.kind == "vocabulary":
        start = rank * local_rows
        stop = min(start + local_rows, spec.vocab_size)
        rows = read(names[0], 0, min(start, spec.vocab_size), max(stop, min(start, spec.vocab_size)))
        padding = rows.new_zeros(local_rows - rows.size(0), rows.size(1))
        return torch.cat([rows, padding]) if len(padding) else rows
    if mapping.kind == "columns":
        width = _columns(mapping, spec) // ranks
        return read(names[0], 1, rank * width, (rank + 1) * width)
    if mapping.kind == "gate_up":
        width = _ffn_size(mapping, spec) // ranks
        return torch.cat([read(name, 0, rank * width, (rank + 1) * width) for name in names])
    groups = spec.kv_heads // ranks
    parts = []
    for name, per_group in zip(names, _rows_per_group(spec), strict=True):
        count = groups * per_group
        part = read(name, 0, rank * count, (rank + 1) * count)
        parts.append(part.reshape(groups, per_group, *part.shape[1:]))
    joined = torch.cat(parts, dim=1)
    return joined.reshape(-1, *joined.shape[2:])


def join_shards(mapping: Mapping, spec: ModelSpec, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """The HF tensors that the tensor-parallel ranks' `shards` (in rank order) make up."""
    names = mapping.hf_names
    if mapping.kind == "whole":
        return [(names[0], shards[0])]
    if mapping.kind == "vocabulary":
        return [(names[0], torch.cat(list(shards))[: spec.vocab_size].contiguous())]
    if mapping.kind == "columns":
        return [(names[0], torch.cat(list(shards), dim=1))]
    if mapping.kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [(name, torch.cat([half[place] for half in halves])) for place, name in enumerate(names)]
    sizes = _rows_per_group(spec)
    parts = [shard.reshape(-1, sum(sizes), *shard.shape[1:]).split(sizes, dim=1) for shard in shards]
    return [
        (name, torch.cat([part[place].reshape(-1, *part[place].shape[2:]) for part in parts]))
        for place, name in enumerate(names)
    ]


def _rows_per_group(spec: ModelSpec) -> tuple[int, int, int]:
    return (spec.heads // spec.kv_heads * spec.head_dim, spec.head_dim, spec.head_dim)


def _ffn_size(mapping: Mapping, spec: ModelSpec) -> int:
    return spec.moe.expert_ffn_size if spec.moe and mapping.expert is not None else spec.ffn_size


def _columns(mapping: Mapping, spec: ModelSpec) -> int:
    if mapping.hf_names[0].endswith("o_proj.weight"):
        return spec.heads * spec.head_dim
    return _ffn_size(mapping, spec)
