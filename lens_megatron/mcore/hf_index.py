"""What an HF folder's safetensors hold, from their headers alone: which file has which tensor, in which shape and dtype.

Without torch, so that a folder can be looked at before anything slow is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_megatron.errors import UsageError
from lens_megatron.folder_note import NOTE
from lens_megatron.mcore.stored_dtypes import BY_SAFETENSORS, Dtype

INDEX_FILE = "model.safetensors.index.json"
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
    NOTE,
)


class HfIndex:
    """The tensors of an HF folder: names, shapes, dtypes, places. Raises where the folder cannot be right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[Path, dict[str, Any]] = {}
        self._data: dict[Path, int] = {}  # where each file's header ends
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: no such folder")
        index = self.folder / INDEX_FILE
        if index.is_file():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                shards = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(f"{index}: not a safetensors index; download it again") from None
            for shard in shards:
                if not (self.folder / shard).is_file():
                    raise UsageError(f"{self.folder / shard}: missing, though {INDEX_FILE} names it; download it again")
                self._headers[self.folder / shard], self._data[self.folder / shard] = _read_header(self.folder / shard)
            for name, shard in weight_map.items():
                if name not in self._headers[self.folder / shard]:
                    raise UsageError(f"{self.folder / shard}: has no tensor {name}, though {INDEX_FILE} says so")
            return {name: self.folder / shard for name, shard in weight_map.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)]
            found = f" ({pickles[0]} is a pickle, which is never loaded: save it as safetensors)" if pickles else ""
            raise UsageError(f"{self.folder}: no safetensors files{found}")
        for path in files:
            self._headers[path], self._data[path] = _read_header(path)
        return {name: path for path in files for name in self._headers[path] if name != "__metadata__"}

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[self._file_of[name]][name]["shape"])

    def location(self, name: str) -> tuple[Path, int, int]:
        """The file that holds a tensor, and where its bytes begin and end in it."""
        path = self._file_of[name]
        start, stop = self._headers[path][name]["data_offsets"]
        return path, self._data[path] + start, self._data[path] + stop

    def dtype(self, name: str) -> Dtype:
        return BY_SAFETENSORS[self._headers[self._file_of[name]][name]["dtype"]]

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
            if kind not in BY_SAFETENSORS:
                raise UsageError(f"{self.folder}: {name} is stored as {kind}; F32, F16 or BF16 is needed")
            _, start, stop = self.location(name)
            if stop - start != math.prod(shape) * BY_SAFETENSORS[kind].itemsize:
                raise UsageError(
                    f"{self._file_of[name]}: {name} has {stop - start} bytes, not those of its shape; damaged"
                )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header and where the data begins, after a check that the file is as long as the header says."""
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
    return header, 8 + length
