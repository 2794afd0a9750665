"""The engine that answers, outside of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lens_megatron.evaluation.config import GenerationConfig
from lens_megatron.rollout.engine import Engine


@contextmanager
def engine_for(config: GenerationConfig, folder: Path) -> Iterator[Engine]:
    """With the weights of an HF folder; closed at the end."""
    import torch

    from lens_megatron.rollout.embedded import EmbeddedEngine

    on_gpu = torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
    torch.set_num_threads(config.threads)
    engine = EmbeddedEngine.from_folder(
        folder, config.slots, "cuda" if on_gpu else "cpu", "bfloat16" if bf16 else "float32"
    )
    try:
        yield engine
    finally:
        engine.close()
