"""HF safetensors -> a Megatron checkpoint that every layout loads."""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools import megatron_target
from checkpoints_tools.pieces import MegatronTensor
from checkpoints_tools.sources import HfSource
from lens_megatron.errors import UsageError
from lens_megatron.mcore.hf_companions import companions_of
from lens_megatron.mcore.stored_dtypes import Dtype


def hf_to_megatron(source: Path, target: Path, dtype: Dtype | None, workers: int) -> None:
    """`dtype`: of the target; None keeps what each tensor has."""
    tensors = HfSource(source)
    stored: dict[str, Dtype] = {}

    def dtype_of(tensor: MegatronTensor) -> Dtype:
        if dtype is not None:
            return dtype
        found = {tensors.dtype(str(piece.tensor)) for piece in tensor.pieces}
        found.add(stored.setdefault(tensor.place.key, min(found)))
        if len(found) > 1:
            names = " and ".join(sorted(each.name for each in found))
            raise UsageError(f"{source}: tensors that become {tensor.place.key} are {names}; give one with --dtype")
        return found.pop()

    megatron_target.write(
        target,
        tensors.spec,
        lambda tensor: tensor.pieces,
        dtype_of,
        tensors,
        tensors.stamp(),
        step=0,
        companions=companions_of(source, dtype),
        workers=workers,
    )
