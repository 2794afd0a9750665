"""`.metadata` of a torch_dist checkpoint: which tensors it has, cut into which chunks, and where each chunk's bytes are.

Megatron-Core's format keeps three kinds of pickles: this index, common.pt, and objects among the tensors. `check` refuses
what would run something when Megatron loads them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron import checkpoints
from lens_megatron.errors import UsageError
from lens_megatron.mcore import safe_pickle
from lens_megatron.mcore.stored_dtypes import BY_NAME, Dtype

FILE = ".metadata"


class _Named:
    """What a pickled object of torch's holds, without torch.distributed, whose import takes longer than reading."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Index(_Named):
    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class _Tensor(_Named):
    properties: Any
    size: Any
    chunks: Any


_IN_METADATA = {
    "Metadata": _Index,
    "TensorStorageMetadata": _Tensor,
    "_MEM_FORMAT_ENCODING": int,
    **dict.fromkeys(("TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata"), _Named),
    **dict.fromkeys(("MetadataIndex", "StorageMeta"), _Named),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): kind for name, kind in _IN_METADATA.items()},
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Named,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, stored as one record."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor, with all leading axes; or an object (no dtype), of which only the bytes are known."""

    dtype: Dtype | None
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


def read(folder: Path) -> dict[str, Stored]:
    path = folder / FILE
    try:
        with checkpoints.reading(path), path.open("rb") as file:
            found = safe_pickle.load(file, _ALLOWED, str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; the checkpoint is not complete") from None
    try:
        if not isinstance(found, _Index):
            raise TypeError(type(found).__name__)
        places = {
            (index.fqn, tuple(getattr(index, "offset", None) or ())): info for index, info in found.storage_data.items()
        }
        return {name: _stored(path, name, entry, places) for name, entry in found.state_dict_metadata.items()}
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: not the index of a distributed checkpoint ({error}); damaged") from None


def _stored(path: Path, name: str, entry: Any, places: Mapping[Any, Any]) -> Stored:
    if not isinstance(entry, _Tensor):
        return Stored(None, (), (_chunk(path, name, ((), ()), places.get((name, ()))),))
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    chunks = [_chunk(path, name, box, places.get((name, box[0]))) for box in boxes]
    return Stored(entry.properties.state[0], tuple(entry.size), tuple(chunks))


def _chunk(path: Path, name: str, box: tuple[tuple[int, ...], tuple[int, ...]], info: Any) -> Chunk:
    if info is None:
        raise UsageError(f"{path}: says nothing about where {name} is; damaged")
    if info.relative_path != os.path.basename(info.relative_path):  # noqa: PTH119
        raise UsageError(f"{path}: {name} is said to be in {info.relative_path!r}, outside the checkpoint; not read")
    if getattr(info, "transform_descriptors", None):
        raise UsageError(f"{path}: {name} is stored compressed, which is not supported")
    return Chunk(*box, info.relative_path, info.offset, info.length)


def read_common(folder: Path) -> dict[str, Any]:
    """common.pt: what is no tensor. Megatron lets it hold any pickle; ours holds plain values, and nothing else is loaded."""
    path = folder / "common.pt"
    try:
        with checkpoints.reading(path):
            content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; damaged or missing") from None
    found = _plain(content, str(path))
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds a {type(found).__name__}, not named values; damaged")
    return found


def check(folder: Path) -> dict[str, Any]:
    """Raise UsageError unless all that Megatron will unpickle is data, and where its index says. It asks no such question
    itself. Gives what common.pt holds."""
    _check_backend(folder / "metadata.json")
    common = read_common(folder)
    stored = read(folder)
    for file in {chunk.file: None for entry in stored.values() for chunk in entry.chunks}:
        with checkpoints.reading(folder / file):
            there = (folder / file).is_file()
        if not there:
            raise UsageError(f"{folder / FILE}: says that tensors are in {file}, which is not there; damaged")
    known: set[bytes] = set()  # a layer's empty state is the same bytes as the next one's
    for name, entry in stored.items():
        if entry.dtype is not None:
            continue
        (chunk,) = entry.chunks
        content = _record(folder / chunk.file, chunk)
        if content not in known:
            _plain(content, f"{folder / chunk.file}: {name}")
            known.add(content)
    return common


def _check_backend(path: Path) -> None:
    try:
        with checkpoints.reading(path):
            found = json.loads(path.read_bytes())
        if found["sharded_backend"] != "torch_dist":
            raise UsageError(f"{path}: tensors are stored as {found['sharded_backend']!r}, which is not read here")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not Megatron-Core's note of the format ({error}); damaged or missing") from None


def _record(path: Path, chunk: Chunk) -> bytes:
    try:
        with checkpoints.reading(path), path.open("rb") as file:
            file.seek(chunk.offset)
            return file.read(chunk.length)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no record where the index says ({error}); damaged or missing") from None


def _plain(content: bytes, where: str) -> Any:
    """What torch.save wrote, when it is plain values and empty tensors."""
    import torch

    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise UsageError(f"{where}: not what torch.save writes; damaged")
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise safe_pickle.Refused(f"{where}: holds more than plain values; not loaded: it may be an attack") from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UsageError(f"{where}: not readable ({str(error).splitlines()[0]}); damaged or missing") from None
    if _has_bytes(found):
        # Transformer Engine keeps FP8 states as pickles inside of tensors, and would load them
        raise safe_pickle.Refused(f"{where}: holds bytes that nothing here reads; not loaded: it may be an attack")
    return found


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_bytes(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_bytes(part) for part in value)
    return hasattr(value, "numel") and value.numel() > 0
