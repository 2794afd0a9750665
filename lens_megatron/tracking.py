"""Metrics to where people already look: TensorBoard events in the run folder, and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lens_megatron.errors import UsageError
from lens_megatron.files import replace_text

_CLOSE_S = 20.0
_WANDB_ID = "wandb_id"  # file in run_dir


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
    """Rank 0's. They hold copies: one that fails is left out from there on, and the run goes on."""

    def __init__(self, config: TrackingConfig, run_dir: Path, name: str, resolved: Mapping[str, Any]) -> None:
        self._open: dict[str, _Tensorboard | _Wandb] = {}
        if config.tensorboard or (config.tensorboard is None and _installed("tensorboard")):
            self._open["tensorboard"] = _Tensorboard(run_dir / "logs")
        if config.wandb_project is not None:
            self._open["wandb"] = _Wandb(config.wandb_project, name, run_dir, resolved)

    def log(self, metrics: Mapping[str, Any]) -> list[str]:
        """What there is to complain of."""
        step = int(metrics["step"])
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and name != "step"
        }
        complaints = []
        for which, tracker in list(self._open.items()):
            try:
                tracker.log(numbers, step)
            except Exception as error:  # a full disk, or whatever wandb raises
                del self._open[which]
                complaints.append(
                    f"tracking: {which} failed at step {step} and gets nothing from here on: {_said(error)}; "
                    "metrics.jsonl has everything"
                )
        return complaints

    def close(self, limit_s: float = _CLOSE_S) -> list[str]:
        """One whose server does not answer must not keep a run from ending, or from saying why it does."""
        complaints = []
        for which, tracker in self._open.items():
            errors: list[Exception] = []
            closing = threading.Thread(target=_close, args=(tracker, errors), daemon=True)
            closing.start()
            closing.join(limit_s)
            if closing.is_alive():
                complaints.append(f"tracking: {which} did not close within {limit_s:g} s, and is left as it is")
            complaints += [f"tracking: {which} could not be closed: {_said(error)}" for error in errors]
        self._open = {}
        return complaints


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, name: str, run_dir: Path, resolved: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=project,
                name=name,
                dir=str(run_dir / "logs"),
                config=dict(resolved),
                id=_id_of(run_dir),
                resume="allow",  # a job that was queued again goes on in the run that it began
            )
        except Exception as error:  # wandb raises its own kinds: no network, no key
            raise UsageError(f"tracking.wandb_project: wandb could not start: {error}") from None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _id_of(run_dir: Path) -> str:
    """Kept in the run's folder, which is what makes a resumed run the same run."""
    path = run_dir / _WANDB_ID
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text().strip():
            return kept
    new = secrets.token_hex(4)
    replace_text(path, f"{new}\n")
    return new


def _close(tracker: _Tensorboard | _Wandb, errors: list[Exception]) -> None:
    try:
        tracker.close()
    except Exception as error:
        errors.append(error)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
