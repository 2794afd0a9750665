"""Rows of tensors out of an HF folder or a Megatron checkpoint. Nothing is mapped or kept: memory is what is being read."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools import metadata
from checkpoints_tools.metadata import Chunk, Stored
from checkpoints_tools.pieces import Piece, Place, hf_pieces, megatron_tensors, part_of
from checkpoints_tools.torch_records import TensorBytes, find_bytes
from lens_megatron import checkpoints, hf_config, strict
from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore.hf_files import HfFolder
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.model_spec import ModelSpec, load_model_spec


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Files:
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

    def read(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        left: memoryview = as_bytes(tensor)
        while left:
            count = os.preadv(self.handle(path), [left], offset)
            if count == 0:
                raise RunError(f"{path}: ends before byte {offset:,}; it was cut off while being read")
            left, offset = left[count:], offset + count
        return tensor

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


class HfSource:
    """An HF folder whose tensors are all there, in the shapes that its config.json says."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.folder = folder
        self.spec = load_model_spec(folder)
        self.shapes = hf_shapes(self.spec)
        self._tensors = HfFolder(folder)
        self._tensors.check(self.shapes)
        self._refuse_unknown()
        self._places = {name: self._tensors.location(name) for name in self.shapes}
        self._files = _Files()

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

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        path, offset, _ = self._places[name]
        dtype, rest = self.dtype(name), self.shapes[name][1:]
        row_bytes = math.prod(rest) * dtype.itemsize
        return self._files.read(path, offset + start * row_bytes, (stop - start, *rest), dtype)

    def piece(self, piece: Piece) -> Tensor:
        assert isinstance(piece.tensor, str)
        return self.rows(piece.tensor, piece.start, piece.stop)

    def stamp(self) -> list[tuple[str, int, int]]:
        return _stamp({path for path, _, _ in self._places.values()} | {self.folder / "config.json"})


class MegatronSource:
    """A checkpoint that training or these tools wrote, in any layout. The optimizer's part is never read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = checkpoints.read_manifest(folder)
        damage = checkpoints.damage(folder, self.manifest)
        if damage is not None:
            raise UsageError(f"{folder}: damaged: {damage}; use another checkpoint")
        self.spec = strict.build(ModelSpec, self.manifest.model, str(folder / checkpoints.MANIFEST))
        self.stored = metadata.read(folder)
        self._places = self._locate()
        self._files = _Files()
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

    def dtype(self, name: str) -> torch.dtype:
        (piece, *_) = self.hf_pieces[name]
        assert isinstance(piece.tensor, Place)
        return self.place_dtype(piece.tensor)

    def place_dtype(self, place: Place) -> torch.dtype:
        dtype = self.stored[place.key].dtype
        assert dtype is not None
        return dtype

    @functools.cached_property
    def hf_pieces(self) -> dict[str, tuple[Piece, ...]]:
        return hf_pieces(self.spec)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of an HF tensor."""
        parts = [self.piece(piece) for piece in part_of(self.hf_pieces[name], start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def piece(self, piece: Piece) -> Tensor:
        """Rows of a Megatron tensor, put together from the chunks of the ranks that wrote it."""
        assert isinstance(piece.tensor, Place)
        return self.place_rows(piece.tensor, piece.start, piece.stop)

    def place_rows(self, place: Place, start: int, stop: int) -> Tensor:
        axes = len(place.lead)
        rest = self.stored[place.key].shape[axes + 1 :]
        out: Tensor | None = None
        filled = 0
        for chunk in self._places[place]:
            row, columns = chunk.offsets[axes], chunk.offsets[axes + 1 :]
            low, high = max(start, row), min(stop, row + chunk.sizes[axes])
            if low >= high:
                continue
            part = self._chunk_rows(place, chunk, low - row, high - row)
            if (low, high) == (start, stop) and part.shape[1:] == rest:
                return part
            if out is None:
                out = torch.empty((stop - start, *rest), dtype=part.dtype)
            box = tuple(slice(first, first + size) for first, size in zip(columns, part.shape[1:], strict=True))
            out[(slice(low - start, high - start), *box)] = part
            filled += part.numel()
        if out is None or filled != out.numel():
            raise UsageError(f"{self.folder}: {place}: rows {start} to {stop} are not all in the checkpoint")
        return out

    def _chunk_rows(self, place: Place, chunk: Chunk, start: int, stop: int) -> Tensor:
        axes = len(place.lead)
        path = self.folder / chunk.file
        record = self._found.get((chunk.file, chunk.offset))
        if record is None:
            record = find_bytes(self._files.handle(path), chunk.offset, chunk.length, str(path))
            if record.dtype != self.place_dtype(place) or math.prod(record.shape) != math.prod(chunk.sizes):
                raise UsageError(f"{path}: {place.key} is not what .metadata says at byte {chunk.offset:,}; damaged")
            self._found[chunk.file, chunk.offset] = record
        rest = chunk.sizes[axes + 1 :]
        before = 0  # tensors of other layers or experts in the same record
        for have, first, size in zip(place.lead, chunk.offsets, chunk.sizes, strict=False):
            before = before * size + have - first
        row = before * chunk.sizes[axes] + start
        offset = record.offset + row * math.prod(rest) * record.dtype.itemsize
        return self._files.read(path, offset, (stop - start, *rest), record.dtype)

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
    if (path / metadata.FILE).is_file():
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
