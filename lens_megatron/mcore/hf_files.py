"""An HF folder's safetensors: which file has which tensor, slices of tensors, and writing new folders.

Everything that can be wrong with a folder is found from the files' headers, before any model is built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.model_spec import ModelSpec

_INDEX = "model.safetensors.index.json"
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What an HF folder has besides weights, copied along when a model is written again.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class HfFolder:
    """Reads slices of an HF checkpoint. Opens each file once; reads nothing but headers until asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[Path, dict[str, Any]] = {}
        self._handles: dict[Path, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: no such folder")
        index = self.folder / _INDEX
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                shards = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(f"{index}: not a safetensors index; download it again") from None
            for shard in shards:
                if not (self.folder / shard).is_file():
                    raise UsageError(f"{self.folder / shard}: missing, though {_INDEX} names it; download it again")
                self._headers[self.folder / shard] = _read_header(self.folder / shard)
            for name, shard in weight_map.items():
                if name not in self._headers[self.folder / shard]:
                    raise UsageError(f"{self.folder / shard}: has no tensor {name}, though {_INDEX} says so")
            return {name: self.folder / shard for name, shard in weight_map.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]
            found = f" ({pickles[0]} is a pickle, which is never loaded: save it as safetensors)" if pickles else ""
            raise UsageError(f"{self.folder}: no safetensors files{found}")
        for path in files:
            self._headers[path] = _read_header(path)
        return {name: path for path in files for name in self._headers[path] if name != "__metadata__"}

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[self._file_of[name]][name]["shape"])

    def location(self, name: str) -> tuple[Path, int, int]:
        """The file that holds a tensor, and where its bytes begin and end in it."""
        path = self._file_of[name]
        with path.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
        start, stop = self._headers[path][name]["data_offsets"]
        return path, data + start, data + stop

    def dtype(self, name: str) -> torch.dtype:
        return _TORCH_DTYPES[self._headers[self._file_of[name]][name]["dtype"]]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless the folder holds all of these tensors, in these shapes, as floating point."""
        missing = [name for name in shapes if name not in self._file_of]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UsageError(f"{self.folder}: no tensor {missing[0]}{more}, which config.json asks for")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise UsageError(f"{self.folder}: {name} has shape {self.shape(name)}, config.json says {shape}")
            kind = self._headers[self._file_of[name]][name]["dtype"]
            if kind not in _TORCH_DTYPES:
                raise UsageError(f"{self.folder}: {name} is stored as {kind}; F32, F16 or BF16 is needed")

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


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors header, after a check that the file is as long as the header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UsageError(f"{path}: not a safetensors file, or cut off inside its header; download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = [
                (entry["data_offsets"][1], entry["shape"], entry["dtype"])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path}: its safetensors header is not readable; download it again") from None
    data = max((stop for stop, _, _ in entries), default=0)
    if 8 + length + data != size:
        raise UsageError(
            f"{path}: truncated: {size:,} bytes, its header promises {8 + length + data:,}; download it again"
        )
    return header


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
) -> None:
    """Stream tensors into sharded safetensors with an index; the folder appears under its name only when complete."""
    if target.exists():
        raise UsageError(f"{target}: exists already; choose another folder or remove it")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: list[Path] = []
    held: dict[str, Tensor] = {}
    names: list[list[str]] = []
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
        (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name in COMPANIONS if companions_from else ():
        if (companions_from / name).is_file():  # type: ignore[operator]
            shutil.copyfile(companions_from / name, partial / name)  # type: ignore[operator]
    partial.rename(target)
