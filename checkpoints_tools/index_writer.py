"""`.metadata` of a torch_dist checkpoint as torch's own writer leaves it, without torch: its import takes longer than
copying a small model. Names of classes are written, none is looked up."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from lens_megatron.mcore.checkpoint_index import Stored

_METADATA = "torch.distributed.checkpoint.metadata"


class _Global(NamedTuple):
    """A class or function by its name."""

    module: str
    name: str


class _Call(NamedTuple):
    function: _Global
    arguments: tuple[Any, ...]


class _Object(NamedTuple):
    kind: _Global
    state: Any  # what its __getstate__ gives


def to_bytes(stored: Mapping[str, Stored]) -> bytes:
    tensors = {name: _tensor(entry) for name, entry in stored.items()}
    places: list[tuple[Any, Any]] = []
    for name, entry in stored.items():
        for chunk in entry.chunks:
            index: dict[str, Any] = {"fqn": name, "index": None}
            if entry.dtype is not None:
                index["offset"] = _size(chunk.offsets)
            info = {"relative_path": chunk.file, "offset": chunk.offset, "length": chunk.length}
            where = _Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            places.append((_named("MetadataIndex", index), _Object(where, info)))
    meta = _named("StorageMeta", {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []})
    state = {"state_dict_metadata": tensors, "planner_data": None, "storage_data": _Pairs(places)}
    whole = _named("Metadata", {**state, "storage_meta": meta, "version": None})
    return b"\x80\x02" + _pickled(whole) + b"."


class _Pairs(list[tuple[Any, Any]]):
    """A dict whose keys are not Python's to hash."""


def _tensor(entry: Stored) -> _Object:
    if entry.dtype is None:
        return _named("BytesStorageMetadata", {})
    layout = _Call(_Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = _Call(_Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = _named("TensorProperties", (_Global("torch", entry.dtype.name), layout, False, contiguous, False))
    chunks = [
        _named("ChunkStorageMetadata", {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
        for chunk in entry.chunks
    ]
    return _named("TensorStorageMetadata", {"properties": properties, "size": _size(entry.shape), "chunks": chunks})


def _named(name: str, state: Any) -> _Object:
    return _Object(_Global(_METADATA, name), state)


def _size(numbers: tuple[int, ...]) -> _Call:
    return _Call(_Global("torch", "Size"), (numbers,))


def _pickled(value: Any) -> bytes:
    """Protocol 2, nothing memoised."""
    if value is None or isinstance(value, bool):
        return {None: b"N", False: b"\x89", True: b"\x88"}[value]
    if isinstance(value, int):
        return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of eight bytes
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, _Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, _Call):
        return _pickled(value.function) + _pickled(tuple(value.arguments)) + b"R"
    if isinstance(value, _Object):
        return _pickled(value.kind) + b")\x81" + _pickled(value.state) + b"b"
    if isinstance(value, (_Pairs, dict)):
        items = value.items() if isinstance(value, dict) else value
        return b"}(" + b"".join(_pickled(part) for item in items for part in item) + b"u"
    parts = b"".join(_pickled(part) for part in value)
    return b"](" + parts + b"e" if isinstance(value, list) else b"(" + parts + b"t"
