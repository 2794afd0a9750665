"""`.metadata` of a torch_dist checkpoint: which tensors it has, cut into which chunks, and where each chunk's bytes are."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from checkpoints_tools import safe_pickle
from lens_megatron.errors import UsageError

FILE = ".metadata"
_CLASSES = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.TensorProperties,
    metadata._MEM_FORMAT_ENCODING,
    metadata.ChunkStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    filesystem._StorageInfo,
    torch.Size,
)
_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in _CLASSES},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
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

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


def read(folder: Path) -> dict[str, Stored]:
    path = folder / FILE
    try:
        with path.open("rb") as file:
            found = safe_pickle.load(file, _ALLOWED, str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; the checkpoint is not complete") from None
    if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
        raise UsageError(f"{path}: not the index of a distributed checkpoint; damaged")
    places = {(index.fqn, tuple(index.offset or ())): info for index, info in found.storage_data.items()}
    stored = {}
    for name, entry in found.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            dtype, shape = entry.properties.dtype, tuple(entry.size)
        else:
            boxes, dtype, shape = [((), ())], None, ()
        chunks = [_chunk(path, name, box, places.get((name, box[0]))) for box in boxes]
        stored[name] = Stored(dtype, shape, tuple(chunks))
    return stored


def read_common(folder: Path) -> dict[str, Any]:
    """common.pt: what is no tensor. Megatron lets it hold any pickle; ours holds plain values, and nothing else is loaded."""
    path = folder / "common.pt"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path}: holds more than plain values; not loaded: the file may be an attack") from None
    except (OSError, RuntimeError, EOFError) as error:
        raise UsageError(f"{path}: not readable ({str(error).splitlines()[0]}); damaged or missing") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds a {type(found).__name__}, not named values; damaged")
    return found


def _chunk(path: Path, name: str, box: tuple[tuple[int, ...], tuple[int, ...]], info: Any) -> Chunk:
    if info is None:
        raise UsageError(f"{path}: says nothing about where {name} is; damaged")
    if info.relative_path != os.path.basename(info.relative_path):  # noqa: PTH119
        raise UsageError(f"{path}: {name} is said to be in {info.relative_path!r}, outside the checkpoint; not read")
    if getattr(info, "transform_descriptors", None):
        raise UsageError(f"{path}: {name} is stored compressed, which is not supported")
    return Chunk(*box, info.relative_path, info.offset, info.length)


def to_bytes(stored: Iterable[tuple[str, Stored]]) -> bytes:
    """The file's content, as torch's own writer leaves it."""
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, entry in stored:
        if entry.dtype is None:
            tensors[name] = metadata.BytesStorageMetadata()
        else:
            chunks = [metadata.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = metadata.TensorProperties(dtype=entry.dtype)
            tensors[name] = metadata.TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        for chunk in entry.chunks:
            index = metadata.MetadataIndex(name, None if entry.dtype is None else torch.Size(chunk.offsets))
            places[index] = filesystem._StorageInfo(chunk.file, chunk.offset, chunk.length)
    whole = metadata.Metadata(tensors, storage_data=places, storage_meta=metadata.StorageMeta())
    return pickle.dumps(whole)
