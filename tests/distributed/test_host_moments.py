"""Training with Adam's moments on the host, sharded, saved and resumed: the same bits as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import checkpoint_cases


@pytest.mark.parametrize(("kind", "world", "layout"), [("qwen2", 2, {"tp": 2}), ("qwen3_moe", 2, {"ep": 2})])
def test_resumed_with_and_without(
    kind: str, world: int, layout: dict[str, int], workers: Any, hf_folder: Any, tmp_path: Path
) -> None:
    """Saved where moments are on the GPU, gone on from where half of them are on the host; and all over again."""
    pool, folder, parallel = workers(world), hf_folder(kind), ParallelConfig(**layout)
    expected = pool.run(checkpoint_cases.uninterrupted, folder, parallel, tmp_path / "plain")[0]
    offloaded = pool.run(checkpoint_cases.uninterrupted, folder, parallel, tmp_path / "host", 0.5)[0]
    crossed = pool.run(checkpoint_cases.resumed, folder, parallel, tmp_path / "plain", "", 1.0)[0]
    back = pool.run(checkpoint_cases.resumed, folder, parallel, tmp_path / "host")[0]
    for name, weight in expected.weights.items():
        for found in (offloaded, crossed, back):
            assert torch.equal(found.weights[name], weight), name
