"""HF safetensors -> a Megatron checkpoint that every layout loads."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoints_tools import megatron_target
from checkpoints_tools.companions import companions_of
from checkpoints_tools.pieces import MegatronTensor
from checkpoints_tools.sources import HfSource
from lens_megatron.errors import UsageError


def hf_to_megatron(source: Path, target: Path, dtype: torch.dtype | None, workers: int) -> None:
    """`dtype`: of the target; None keeps what each tensor has."""
    tensors = HfSource(source)
    stored: dict[str, torch.dtype] = {}

    def dtype_of(tensor: MegatronTensor) -> torch.dtype:
        if dtype is not None:
            return dtype
        found = {tensors.dtype(str(piece.tensor)) for piece in tensor.pieces}
        found.add(stored.setdefault(tensor.place.key, min(found, key=str)))
        if len(found) > 1:
            names = " and ".join(sorted(str(each).removeprefix("torch.") for each in found))
            raise UsageError(f"{source}: tensors that become {tensor.place.key} are {names}; give one with --dtype")
        return found.pop()

    megatron_target.write(
        target,
        tensors.spec,
        lambda tensor: tensor.pieces,
        dtype_of,
        tensors.piece,
        tensors.stamp(),
        step=0,
        companions=companions_of(source, dtype),
        workers=workers,
    )
