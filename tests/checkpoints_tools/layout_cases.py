"""What runs on every rank of the layout tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from tests.distributed import checkpoint_cases as cases
from tests.tiny_models import random_sequences

SEQUENCES = random_sequences(4)


def loaded(
    other_hf: Path, checkpoint: Path, layout: ParallelConfig
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Any]]:
    """HF tensors (on rank 0) and log-probs of a model that began with other weights and then loaded `checkpoint`."""
    from lens_megatron.mcore import checkpoint as training

    trainable = cases.policy(other_hf, layout)
    extra = training.load(trainable, checkpoint)
    return cases.exported(trainable), scores(trainable, SEQUENCES), extra


def trained(hf: Path, target: Path, layout: ParallelConfig) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Two training steps, then a checkpoint with the optimizer."""
    from lens_megatron.mcore import checkpoint as training

    trainable = cases.policy(hf, layout)
    cases.train(trainable, 2)
    training.save(trainable, target, {"position": 7}, step=2, companions_from=hf)
    return cases.exported(trainable), scores(trainable, SEQUENCES)


def scores(model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return model.score(sequences, 64, 1.0).logprobs
