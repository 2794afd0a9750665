"""Writing a Megatron checkpoint without Megatron: the names, shapes, chunks and files that training writes at TP 1.

Weights only. Each linear layer's empty `_extra_state` is written too, because loading asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lens_megatron
from checkpoints_tools import index_writer
from checkpoints_tools.pieces import MegatronTensor, Piece, Place, megatron_tensors, modules_with_state, part_of
from checkpoints_tools.show_progress import bytes_bar
from checkpoints_tools.streaming import Job, Plan, Source, stream, unfinished, write_small
from checkpoints_tools.torch_records import frame, plain_archive
from lens_megatron import checkpoints
from lens_megatron.checkpoints import Manifest
from lens_megatron.mcore import checkpoint_index
from lens_megatron.mcore.checkpoint_index import Chunk, Stored
from lens_megatron.mcore.stored_dtypes import Dtype
from lens_megatron.model_spec import ModelSpec

_FILE_BYTES = 4 * 2**30
_ONE_RANK = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}


def write(
    target: Path,
    spec: ModelSpec,
    pieces_of: Callable[[MegatronTensor], tuple[Piece, ...]],
    dtype_of: Callable[[MegatronTensor], Dtype],
    source: Source,
    made_from: Any,
    *,
    step: int,
    companions: Mapping[str, bytes],
    extra: bytes = b"{}",
    metrics: Mapping[str, float] | None = None,
    workers: int,
    replace: bool = False,
) -> None:
    """`companions`: what goes into hf/ of the checkpoint; `extra`: the training loop's own state; `replace`: `target`
    exists, and makes way once the new one is complete."""
    dtypes = {tensor.place: dtype_of(tensor) for tensor in megatron_tensors(spec)}
    plan, stored = _plan(spec, pieces_of, dtypes)
    made_from = [made_from, sorted(f"{place} {dtype.name}" for place, dtype in dtypes.items()), asdict(spec)]
    with (
        unfinished(target, plan, made_from, replace) as partial,
        bytes_bar(target.name, sum(job.bytes for job in plan.jobs)) as on_bytes,
    ):
        stream(partial, source, workers, on_bytes)
        common = plain_archive({"trainer": {"step": step}})
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backend |= {"common_backend": "torch", "common_backend_version": 1}
        small = {"common.pt": common, "extra.json": extra, "metadata.json": json.dumps(backend).encode()}
        small |= {f"hf/{name}": content for name, content in companions.items()}
        sizes = dict(plan.sizes) | write_small(partial.folder, small)
        partial.close()
        sizes |= write_small(partial.folder, {checkpoint_index.FILE: index_writer.to_bytes(stored)})
        manifest = Manifest(
            step=step,
            model=asdict(spec),
            layout=dict(_ONE_RANK),
            world_size=1,
            dtype=_main_dtype(plan).name,
            optimizer=False,
            files=sizes,
            metrics=dict(metrics or {}),
            version=lens_megatron.__version__,
        )
        checkpoints.complete(target, manifest)


def _plan(
    spec: ModelSpec, pieces_of: Callable[[MegatronTensor], tuple[Piece, ...]], dtypes: Mapping[Place, Dtype]
) -> tuple[Plan, dict[str, Stored]]:
    sizes: dict[str, int] = {}
    fixed: list[tuple[str, int, bytes]] = []
    jobs: list[Job] = []
    chunks: dict[str, list[Chunk]] = {}
    shapes: dict[str, tuple[Dtype | None, tuple[int, ...]]] = {}
    empty = plain_archive([None])
    name, end = "__0_0.distcp", 0

    def place_for(size: int) -> tuple[str, int]:
        nonlocal name, end
        if end and end + size > _FILE_BYTES:
            name, end = f"__0_{len(sizes)}.distcp", 0
        start, end = end, end + size
        sizes[name] = end
        return name, start

    for key, lead, axes in modules_with_state(spec):
        file, offset = place_for(len(empty))
        fixed.append((file, offset, empty))
        object_key = f"{key}._extra_state/shard_{_dotted(lead)}_{_dotted(axes)}"
        shapes[object_key] = (None, ())
        chunks[object_key] = [Chunk((), (), file, offset, len(empty))]
    for tensor in megatron_tensors(spec):
        key, lead = tensor.place
        dtype = dtypes[tensor.place]
        shapes[key] = (dtype, tensor.lead_sizes + tensor.shape)
        rows = tensor.shape[0] // tensor.parts
        for part in range(tensor.parts):
            box = (*(1 for _ in lead), rows, *tensor.shape[1:])
            record = frame(box, dtype)
            file, offset = place_for(record.size)
            data = offset + len(record.head)
            fixed += [(file, offset, record.head), (file, data + record.data_bytes, record.tail)]
            pieces = part_of(pieces_of(tensor), part * rows, (part + 1) * rows)
            jobs.append(Job(f"{tensor.place} {part}", file, data, dtype, pieces, tensor.shape[1:]))
            offsets = (*lead, part * rows, *(0 for _ in tensor.shape[1:]))
            chunks.setdefault(key, []).append(Chunk(offsets, box, file, offset, record.size))
    stored = {key: Stored(dtype, shape, tuple(chunks[key])) for key, (dtype, shape) in shapes.items()}
    return Plan(sizes, fixed, jobs), stored


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)


def _main_dtype(plan: Plan) -> Dtype:
    count: dict[Dtype, int] = {}
    for job in plan.jobs:
        count[job.dtype] = count.get(job.dtype, 0) + job.bytes
    return max(count, key=lambda dtype: count[dtype])
