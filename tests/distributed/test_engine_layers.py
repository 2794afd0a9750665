"""Layers put together as Transformer Engine's are, of plain modules: what their checkpoints call the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.sources import MegatronSource
from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import engine_layer_cases


@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen3_moe"])
def test_runs_with_and_without_transformer_engine_read_each_others(
    kind: str, workers: Any, hf_folder: Any, tmp_path: Path
) -> None:
    folder, target = hf_folder(kind), tmp_path / "step_000002"
    norms, saved_weights, found = workers(2).run(
        engine_layer_cases.saved_by_one_loaded_by_the_other, folder, ParallelConfig(tp=2), target
    )[0]
    assert any("linear_qkv.layer_norm" in name for name in norms)  # they were put together differently
    assert found.keys() == saved_weights.keys() and len(found) > 10
    assert all(torch.equal(found[name], tensor) for name, tensor in saved_weights.items())
    MegatronSource(target)  # which finds every tensor under the name that the tools know
