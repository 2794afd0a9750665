"""What runs on every rank of test_engine_layers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import checkpoint_cases


def put_together(patch: Any) -> None:
    """Layers as Megatron-Core makes them of Transformer Engine's modules: a norm fused into the product that reads it, and
    only before experts one of its own. Here of plain modules, which hold weights and compute nothing."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from lens_megatron.mcore import layer_spec
    from lens_megatron.mcore.attention import PackedAttention
    from lens_megatron.mcore.norm import PlainRMSNorm

    class Fused(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, **settings: Any) -> None:
            super().__init__(input_size, output_size, **settings)
            self.layer_norm_weight = torch.nn.Parameter(torch.zeros(input_size))

    class Provider(LocalSpecProvider):
        def column_parallel_layer_norm_linear(self) -> type:
            return Fused

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
            return PlainRMSNorm

        def core_attention(self) -> type:
            return PackedAttention

    patch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
    patch.setattr(transformer_engine, "TENorm", PlainRMSNorm)
    patch.setattr(layer_spec, "runs_on_engine", lambda dtype: True)


def saved_by_one_loaded_by_the_other(
    folder: Path, layout: ParallelConfig, target: Path
) -> tuple[set[str], dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of a run with Transformer Engine's layers: names of its norms, its weights, and those that the plain layers
    of another run found in it."""
    import pytest

    from lens_megatron.mcore import checkpoint

    with pytest.MonkeyPatch.context() as patch:
        put_together(patch)
        fused = checkpoint_cases.policy(folder, layout)
        norms = {name.rpartition("layers.")[2] for chunk in fused.chunks for name, _ in chunk.named_parameters()}
        checkpoint.save(fused, target, checkpoint_cases.EXTRA, step=2, companions_from=folder)
        weights = checkpoint_cases.exported(fused)
    plain = checkpoint_cases.policy(folder, layout)
    with torch.no_grad():
        for chunk in plain.chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
    checkpoint.load(plain, target)
    return {name for name in norms if "layer" in name and "norm" in name}, weights, checkpoint_cases.exported(plain)
