"""Slices of an HF folder's tensors, and writing new folders."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_megatron import checkpoints
from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_companions import companions_of
from lens_megatron.mcore.hf_index import INDEX_FILE, HfIndex
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.mcore.stored_dtypes import BY_NAME, Dtype
from lens_megatron.model_spec import ModelSpec


class HfFolder(HfIndex):
    """Reads slices of an HF checkpoint. Opens each file once; reads nothing but headers until asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._handles: dict[Path, Any] = {}

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A tensor, or rows (dim 0) or columns (dim 1) [start, stop) of it; only these bytes are read."""
        view = self._handle(self._file_of[name]).get_slice(name)
        if dim is None:
            return view[:]
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def _handle(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path]


def check_folder(folder: Path, spec: ModelSpec) -> HfFolder:
    """The folder's tensors for reading, after a check from headers alone that it holds all of this model."""
    source = HfFolder(folder)
    source.check(hf_shapes(spec))
    return source


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, std: float = 0.02) -> Iterator[tuple[str, Tensor]]:
    """Weights to start from when there are none: norms 1, biases 0, the rest normal."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith("bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, torch.empty(shape).normal_(0.0, std, generator=generator)


def write_hf_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    companions_from: Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
    replace: bool = False,
    template: str | None = None,
) -> None:
    """Stream tensors into sharded safetensors with an index; the folder appears under its name only when complete and on
    disk. config.json gets the tensors' dtype. `replace`: a folder of that name makes way. `template`: the weights' own, noted
    beside the companions."""
    if target.exists() and not replace:
        raise UsageError(f"{target}: exists already; choose another folder or remove it")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype = _write_shards(partial, tensors, max_shard_bytes)
        if companions_from is not None:
            for name, content in companions_of(companions_from, dtype, template).items():
                (partial / name).write_bytes(content)
        for path in partial.iterdir():
            checkpoints.sync(path)
        checkpoints.publish(target)
    except BaseException:
        checkpoints.abandon(target)
        raise


def _write_shards(partial: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Dtype:
    """The dtype of most of the bytes."""
    files: list[Path] = []
    held: dict[str, Tensor] = {}
    names: list[list[str]] = []
    by_dtype: Counter[str] = Counter()
    total = size = 0

    def flush() -> None:
        nonlocal held, size
        path = partial / f"shard-{len(files):05d}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        files.append(path)
        names.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if held and size + bytes_ > max_shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        size, total = size + bytes_, total + bytes_
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += bytes_
    flush()
    if len(files) == 1:
        files[0].rename(partial / "model.safetensors")
    else:
        weight_map = {}
        for number, (path, members) in enumerate(zip(files, names, strict=True), 1):
            final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            path.rename(partial / final)
            weight_map.update(dict.fromkeys(members, final))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return BY_NAME[by_dtype.most_common(1)[0][0]]
