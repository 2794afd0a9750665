"""Metrics to where people already look: TensorBoard events in the run folder, and Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lens_megatron.errors import UsageError


@dataclass(frozen=True)
class TrackingConfig:
    """`tracking:`. metrics.jsonl is always written; these are copies of it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    tensorboard: bool | None = None  # events in run_dir/logs; null: when tensorboard is installed
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if self.tensorboard and not _installed("tensorboard"):
            raise ValueError("tensorboard is not installed: pip install 'lens-megatron[tracking]', or leave it null")
        if self.wandb_project is not None and not _installed("wandb"):
            raise ValueError(
                "wandb is not installed: pip install 'lens-megatron[tracking]', or leave wandb_project out"
            )


class Trackers:
    """Rank 0's."""

    def __init__(self, config: TrackingConfig, run_dir: Path, name: str, resolved: Mapping[str, Any]) -> None:
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard or (config.tensorboard is None and _installed("tensorboard")):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "logs"))
        if config.wandb_project is not None:
            import wandb

            try:
                self._wandb = wandb.init(
                    project=config.wandb_project, name=name, dir=str(run_dir / "logs"), config=dict(resolved)
                )
            except Exception as error:  # wandb raises its own kinds: no network, no key
                raise UsageError(f"tracking.wandb_project: wandb could not start: {error}") from None

    def log(self, metrics: Mapping[str, Any]) -> None:
        step = int(metrics["step"])
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and name != "step"
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
