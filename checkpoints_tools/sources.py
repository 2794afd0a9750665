"""Rows of tensors out of an HF folder or a Megatron checkpoint. Nothing is mapped or kept: memory is what is being read.

Rows that lie in a file as they are to be written are given as extents, to be copied as bytes; others (columns cut over
ranks, another dtype) are put together in memory. torch is imported only for what computes.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoints_tools.pieces import Piece, Place, hf_pieces, megatron_tensors, part_of
from checkpoints_tools.torch_records import TensorBytes, find_bytes
from lens_megatron import checkpoints, hf_config, strict
from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore import checkpoint_index
from lens_megatron.mcore.checkpoint_index import Chunk, Stored
from lens_megatron.mcore.hf_index import HfIndex
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.mcore.stored_dtypes import Dtype
from lens_megatron.model_spec import ModelSpec, load_model_spec

if TYPE_CHECKING:
    from torch import Tensor

Raw = NDArray[np.uint8]  # [rows, bytes of a row]
Position = tuple[str, int, int]  # file, offset, row: which of two pieces comes first on the disk


class Extent(NamedTuple):
    """Bytes of a file."""

    path: Path
    offset: int
    length: int


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def as_tensor(raw: Raw, dtype: Dtype, rest: tuple[int, ...]) -> Tensor:
    """Rows as a tensor; `rest`: the shape of a row."""
    import torch

    return torch.from_numpy(raw.reshape(-1)).view(getattr(torch, dtype.name)).reshape(len(raw), *rest)


class Files:
    """Open files, by path; reads are positional, so that threads share them."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def handle(self, path: Path) -> int:
        if path not in self._open:
            try:
                opened = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise RunError(f"{path}: {error.strerror}") from None
            if self._open.setdefault(path, opened) != opened:
                os.close(opened)  # another thread was first
        return self._open[path]

    def read(self, extent: Extent) -> Raw:
        path, offset, length = extent
        raw = np.empty(length, np.uint8)
        left = memoryview(raw)  # type: ignore[arg-type]
        while left:
            count = os.preadv(self.handle(path), [left], offset)
            if count == 0:
                raise cut_off(extent)
            left, offset = left[count:], offset + count
        return raw

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


def cut_off(extent: Extent) -> RunError:
    end = extent.offset + extent.length
    return RunError(f"{extent.path}: ends before byte {end:,}; it was cut off while being read")


class HfSource:
    """An HF folder whose tensors are all there, in the shapes that its config.json says."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.folder = folder
        self.spec = load_model_spec(folder)
        self.shapes = hf_shapes(self.spec)
        self._tensors = HfIndex(folder)
        self._tensors.check(self.shapes)
        self._refuse_unknown()
        self.files = Files()

    def _refuse_unknown(self) -> None:
        """A tensor that would be left out without a word is a model that computes something else."""
        ignored = {"lm_head.weight"} if self.spec.tied else set()
        unknown = [name for name in self._tensors.names() if name not in self.shapes and name not in ignored]
        unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise UsageError(
                f"{self.folder}: tensor {unknown[0]} is none of a {self.spec.family} model with this config.json "
                f"({len(unknown)} such tensors); is config.json of another model?"
            )

    def dtype(self, name: str) -> Dtype:
        return self._tensors.dtype(name)

    def piece_dtype(self, piece: Piece) -> Dtype:
        return self.dtype(str(piece.tensor))

    def position(self, piece: Piece) -> Position:
        (extent,) = self.extents(piece)
        return str(extent.path), extent.offset, 0

    def extents(self, piece: Piece) -> list[Extent]:
        name = str(piece.tensor)
        path, offset, _ = self._tensors.location(name)
        row_bytes = math.prod(self.shapes[name][1:]) * self.dtype(name).itemsize
        return [Extent(path, offset + piece.start * row_bytes, (piece.stop - piece.start) * row_bytes)]

    def raw(self, piece: Piece) -> Raw:
        (extent,) = self.extents(piece)
        return self.files.read(extent).reshape(piece.stop - piece.start, -1)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return as_tensor(self.raw(Piece(name, start, stop)), self.dtype(name), self.shapes[name][1:])

    def stamp(self) -> list[tuple[str, int, int]]:
        paths = {self._tensors.location(name)[0] for name in self.shapes}
        return _stamp(paths | {self.folder / "config.json"})


class _Part(NamedTuple):
    """A stored box that holds some of the rows that are asked for."""

    rows: slice  # among those asked for
    columns: slice  # bytes of a row
    extent: Extent


class MegatronSource:
    """A checkpoint that training or these tools wrote, in any layout. The optimizer's part is never read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = checkpoints.read_manifest(folder)
        damage = checkpoints.damage(folder, self.manifest)
        if damage is not None:
            raise UsageError(f"{folder}: damaged: {damage}; use another checkpoint")
        self.spec = strict.build(ModelSpec, self.manifest.model, str(folder / checkpoints.MANIFEST))
        self.stored = checkpoint_index.read(folder)
        self._places = self._locate()
        self.files = Files()
        self._found: dict[tuple[str, int], TensorBytes] = {}

    def _locate(self) -> dict[Place, list[Chunk]]:
        by_lead: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}
        for tensor in megatron_tensors(self.spec):
            key, sizes, shape = tensor.place.key, tensor.lead_sizes, tensor.shape
            if key in by_lead:
                continue
            entry, axes = self.stored.get(key), len(sizes)
            if entry is None or entry.dtype is None:
                raise UsageError(f"{self.folder}: no tensor {key}, which the model in its manifest has")
            # only a vocabulary may have more rows: a layout that does not divide 128 pads more
            rows_fit = entry.shape[axes] == shape[0] or (not axes and entry.shape[0] > shape[0])
            if entry.shape[:axes] != sizes or not rows_fit or entry.shape[axes + 1 :] != shape[1:]:
                raise UsageError(f"{self.folder}: {key} has shape {entry.shape}, the model says {sizes + shape}")
            by_lead[key] = _by_lead(entry, axes)
        places = [tensor.place for tensor in megatron_tensors(self.spec)]
        return {place: by_lead[place.key].get(place.lead, []) for place in places}

    def dtype(self, name: str) -> Dtype:
        return self.piece_dtype(self.hf_pieces[name][0])

    def piece_dtype(self, piece: Piece) -> Dtype:
        assert isinstance(piece.tensor, Place)
        return self.place_dtype(piece.tensor)

    def place_dtype(self, place: Place) -> Dtype:
        dtype = self.stored[place.key].dtype
        assert dtype is not None
        return dtype

    @functools.cached_property
    def hf_pieces(self) -> dict[str, tuple[Piece, ...]]:
        return hf_pieces(self.spec)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of an HF tensor."""
        import torch

        parts = [self.tensor(piece) for piece in part_of(self.hf_pieces[name], start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def place_rows(self, place: Place, start: int, stop: int) -> Tensor:
        return self.tensor(Piece(place, start, stop))

    def tensor(self, piece: Piece) -> Tensor:
        """Rows of a Megatron tensor."""
        assert isinstance(piece.tensor, Place)
        rest = self.stored[piece.tensor.key].shape[len(piece.tensor.lead) + 1 :]
        return as_tensor(self.raw(piece), self.place_dtype(piece.tensor), rest)

    def position(self, piece: Piece) -> Position:
        """From the index alone: looking into every record first would take a large checkpoint minutes."""
        assert isinstance(piece.tensor, Place)
        axes = len(piece.tensor.lead)
        first = min(self._places[piece.tensor], key=lambda chunk: chunk.offsets[axes:], default=None)
        return ("", 0, 0) if first is None else (first.file, first.offset, piece.start)

    def extents(self, piece: Piece) -> list[Extent] | None:
        """Where these rows lie one after another; None when ranks have cut them by columns."""
        row, found = 0, []
        for part in self._parts(piece):
            if part.rows.start != row or part.columns != slice(0, self._row_bytes(piece)):
                return None
            row = part.rows.stop
            found.append(part.extent)
        return found if row == piece.stop - piece.start else None

    def raw(self, piece: Piece) -> Raw:
        """Rows of a Megatron tensor, put together from the chunks of the ranks that wrote it."""
        rows = piece.stop - piece.start
        parts, whole = self._parts(piece), (slice(0, rows), slice(0, self._row_bytes(piece)))
        if len(parts) == 1 and parts[0][:2] == whole:
            return self.files.read(parts[0].extent).reshape(rows, -1)
        if sum(part.extent.length for part in parts) != rows * self._row_bytes(piece):
            asked = f"rows {piece.start} to {piece.stop}"
            raise UsageError(f"{self.folder}: {piece.tensor}: {asked} are not all in the checkpoint")
        out: Raw = np.empty((rows, self._row_bytes(piece)), np.uint8)
        for part in parts:
            width = part.columns.stop - part.columns.start
            out[part.rows, part.columns] = self.files.read(part.extent).reshape(-1, width)
        return out

    def _row_bytes(self, piece: Piece) -> int:
        assert isinstance(piece.tensor, Place)
        rest = self.stored[piece.tensor.key].shape[len(piece.tensor.lead) + 1 :]
        return math.prod(rest) * self.piece_dtype(piece).itemsize

    def _parts(self, piece: Piece) -> list[_Part]:
        """In the order of their rows."""
        place = piece.tensor
        assert isinstance(place, Place)
        axes, itemsize, found = len(place.lead), self.place_dtype(place).itemsize, []
        for chunk in self._places[place]:
            row, size = chunk.offsets[axes], chunk.sizes[axes]
            low, high = max(piece.start, row), min(piece.stop, row + size)
            if low >= high:
                continue
            # a row is a number or a vector: no tensor here has more axes
            first, width = (chunk.offsets[axes + 1], chunk.sizes[axes + 1]) if len(chunk.sizes) > axes + 1 else (0, 1)
            columns = slice(first * itemsize, (first + width) * itemsize)
            rows = slice(low - piece.start, high - piece.start)
            found.append(
                _Part(rows, columns, self._chunk_extent(place, chunk, low - row, high - row, width * itemsize))
            )
        return sorted(found, key=lambda part: (part.rows.start, part.columns.start))

    def _chunk_extent(self, place: Place, chunk: Chunk, start: int, stop: int, row_bytes: int) -> Extent:
        path = self.folder / chunk.file
        record = self._found.get((chunk.file, chunk.offset))
        if record is None:
            record = find_bytes(self.files.handle(path), chunk.offset, chunk.length, str(path))
            if record.dtype != self.place_dtype(place) or math.prod(record.shape) != math.prod(chunk.sizes):
                raise UsageError(f"{path}: {place.key} is not what .metadata says at byte {chunk.offset:,}; damaged")
            self._found[chunk.file, chunk.offset] = record
        before = 0  # tensors of other layers or experts in the same record
        for have, first, size in zip(place.lead, chunk.offsets, chunk.sizes, strict=False):
            before = before * size + have - first
        row = before * chunk.sizes[len(place.lead)] + start
        return Extent(path, record.offset + row * row_bytes, (stop - start) * row_bytes)

    def hf_config(self) -> dict[str, object]:
        """The config.json that came along when it describes this model; else one made from the manifest."""
        file = self.folder / "hf" / "config.json"
        if file.is_file() and load_model_spec(file.parent) == self.spec:
            config: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
            return config
        return hf_config.to_hf_config(self.spec, self.manifest.dtype)

    def stamp(self) -> list[tuple[str, int, int]]:
        return _stamp({self.folder / name for name in self.manifest.files} | {self.folder / checkpoints.MANIFEST})


@dataclass(frozen=True)
class Format:
    name: str  # hf | megatron
    folder: Path


def find_checkpoint(path: Path) -> Format:
    """What is at `path`; of a run folder, or a folder of checkpoints, the newest whole checkpoint."""
    if (path / checkpoints.MANIFEST).is_file():
        return Format("megatron", path)
    for root in (path, path / "checkpoints"):
        found = checkpoints.latest(root)
        if found is not None:
            return Format("megatron", found.folder)
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder")
    if (path / checkpoint_index.FILE).is_file():
        raise UsageError(f"{path}: a distributed checkpoint without {checkpoints.MANIFEST}: incomplete, or not of ours")
    if (path / "config.json").is_file():
        return Format("hf", path)
    unfinished = " (an unfinished one: run the command that wrote it again)" if path.suffix == ".partial" else ""
    raise UsageError(
        f"{path}: neither an HF folder (config.json) nor a checkpoint ({checkpoints.MANIFEST}){unfinished}"
    )


def open_source(path: Path) -> HfSource | MegatronSource:
    found = find_checkpoint(path)
    return HfSource(found.folder) if found.name == "hf" else MegatronSource(found.folder)


def open_megatron(path: Path) -> MegatronSource:
    source = open_source(path)
    if isinstance(source, HfSource):
        raise UsageError(f"{path}: an HF folder; a Megatron checkpoint ({checkpoints.MANIFEST}) is needed here")
    return source


def _by_lead(entry: Stored, axes: int) -> dict[tuple[int, ...], list[Chunk]]:
    """Chunks by the place on the leading axes that they cover; one chunk may cover several."""
    found: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in entry.chunks:
        box = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
        for lead in itertools.product(*(range(first, first + size) for first, size in box)):
            found.setdefault(lead, []).append(chunk)
    return found


def _stamp(paths: set[Path]) -> list[tuple[str, int, int]]:
    """Changes when a file does: what a half-done conversion was made from must still be what it is made from."""
    states = [(path, path.stat()) for path in sorted(paths)]
    return [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states]
