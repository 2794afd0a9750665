"""A checkpoint of any layout -> an HF folder that transformers and SGLang open as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

from checkpoints_tools.show_progress import bytes_bar
from checkpoints_tools.sources import open_megatron
from checkpoints_tools.streaming import Job, Plan, stream, unfinished, write_small
from lens_megatron import checkpoints
from lens_megatron.mcore.hf_companions import companions_of, config_bytes
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.mcore.stored_dtypes import Dtype

SHARD_BYTES = 5 * 10**9


def megatron_to_hf(
    source: Path, target: Path, dtype: Dtype | None, workers: int, shard_bytes: int = SHARD_BYTES
) -> None:
    """`dtype`: of the target; None keeps what each tensor has."""
    checkpoint = open_megatron(source)
    shapes = hf_shapes(checkpoint.spec)
    dtypes = {name: dtype or checkpoint.dtype(name) for name in shapes}
    shards = _shards({name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}, shard_bytes)
    sizes: dict[str, int] = {}
    fixed: list[tuple[str, int, bytes]] = []
    jobs: list[Job] = []
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, data = _header(names, shapes, dtypes)
        fixed.append((file, 0, header))
        for name in names:
            jobs.append(Job(name, file, data, dtypes[name], checkpoint.hf_pieces[name], shapes[name][1:]))
            data += jobs[-1].bytes
        sizes[file] = data
    plan = Plan(sizes, fixed, jobs)
    total = sum(job.bytes for job in jobs)
    made_from = [checkpoint.stamp(), sorted(f"{name} {kind.name}" for name, kind in dtypes.items())]
    with unfinished(target, plan, made_from) as partial, bytes_bar(target.name, total) as on_bytes:
        stream(partial, checkpoint, workers, on_bytes)
        main = max(set(dtypes.values()), key=lambda kind: sum(job.bytes for job in jobs if job.dtype == kind))
        small = companions_of(checkpoint.folder / "hf", None)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": {job.name: job.file for job in jobs}}
            small["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
        small["config.json"] = config_bytes(checkpoint.hf_config(), main)
        write_small(partial.folder, small)
        partial.close()
        checkpoints.sync(partial.folder)
        partial.folder.rename(target)
        checkpoints.sync(target.parent)


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(names: list[str], shapes: dict[str, tuple[int, ...]], dtypes: dict[str, Dtype]) -> tuple[bytes, int]:
    """A safetensors header, and where the data begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        size = math.prod(shapes[name]) * dtypes[name].itemsize
        entries[name] = {
            "dtype": dtypes[name].safetensors,
            "shape": shapes[name],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)
