"""New Megatron checkpoints out of old ones: the mean of several, and one without its optimizer. Weights only, streamed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoints_tools import megatron_target
from checkpoints_tools.pieces import MegatronTensor, Piece
from checkpoints_tools.sources import MegatronSource, Position, Raw, as_bytes, open_megatron
from lens_megatron import checkpoints
from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_companions import companions_of
from lens_megatron.mcore.stored_dtypes import Dtype


def parse_weights(text: str | None, count: int) -> list[float]:
    """Shares that sum to 1."""
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r}: write numbers with commas between, as 1,1,2") from None
    total = math.fsum(weights)
    if len(weights) != count or not math.isfinite(total) or total <= 0:
        raise UsageError(f"--weights {text!r}: {count} numbers with a sum above 0 are needed, one a checkpoint")
    return [weight / total for weight in weights]


def average(sources: Sequence[Path], target: Path, weights: Sequence[float], workers: int) -> None:
    """Weighted mean, computed in float64, in the dtype of the first. The newest one's step and companions."""
    if len(sources) < 2:
        raise UsageError("average: at least two checkpoints and a target are needed: average A B ... DST")
    opened = [open_megatron(source) for source in sources]
    first, newest = opened[0], max(opened, key=lambda source: source.manifest.step)
    for other in opened[1:]:
        checkpoints.check_same_model(other.folder, other.manifest, first.manifest.model)

    megatron_target.write(
        target,
        first.spec,
        _same_rows,
        lambda tensor: first.place_dtype(tensor.place),
        _Mean(opened, weights),
        [[source.stamp() for source in opened], list(weights)],
        step=newest.manifest.step,
        companions=companions_of(newest.folder / "hf", None),
        workers=workers,
    )


class _Mean:
    """Rows of the weighted mean, as something to stream from."""

    def __init__(self, sources: Sequence[MegatronSource], weights: Sequence[float]) -> None:
        self.files = sources[0].files
        self._parts = list(zip(sources, weights, strict=True))

    def position(self, piece: Piece) -> Position:
        return self._parts[0][0].position(piece)

    def extents(self, piece: Piece) -> None:
        return None

    def piece_dtype(self, piece: Piece) -> Dtype:
        return self._parts[0][0].piece_dtype(piece)

    def raw(self, piece: Piece) -> Raw:
        parts = (source.tensor(piece).double() * weight for source, weight in self._parts)
        mean = functools.reduce(torch.add, parts).to(getattr(torch, self.piece_dtype(piece).name))
        return np.frombuffer(as_bytes(mean.contiguous()), np.uint8).reshape(piece.stop - piece.start, -1)


def prune_optimizer(path: Path, workers: int) -> Path:
    """The same checkpoint with its weights alone. It stays as it was until the smaller one is complete."""
    source = open_megatron(path)
    folder, manifest = source.folder, source.manifest
    if not manifest.optimizer:
        raise UsageError(f"{folder}: holds no optimizer: nothing to prune")
    megatron_target.write(
        folder,
        source.spec,
        _same_rows,
        lambda tensor: source.place_dtype(tensor.place),
        source,
        source.stamp(),
        step=manifest.step,
        companions=companions_of(folder / "hf", None),
        extra=(folder / "extra.json").read_bytes(),
        metrics=manifest.metrics,
        workers=workers,
        replace=True,
    )
    return folder


def _same_rows(tensor: MegatronTensor) -> tuple[Piece, ...]:
    """Without the vocabulary's padding, which another layout may not have."""
    rows = sum(piece.stop - piece.start for piece in tensor.pieces)
    return (Piece(tensor.place, 0, rows),)
