"""TensorBoard events hold what metrics.jsonl holds; what is not installed is refused when the configuration is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lens_megatron import strict, tracking
from lens_megatron.errors import UsageError
from lens_megatron.tracking import Trackers, TrackingConfig


def test_events_hold_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(TrackingConfig(tensorboard=True), tmp_path, "run", {})
    trackers.log({"step": 1, "reward": 0.25, "kl": float("nan"), "name": "text", "time/step": 2})
    trackers.log({"step": 2, "reward": 0.5})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert set(events.Tags()["scalars"]) == {"reward", "time/step"}
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]


def test_off_writes_nothing(tmp_path: Path) -> None:
    trackers = Trackers(TrackingConfig(tensorboard=False), tmp_path, "run", {})
    trackers.log({"step": 1, "reward": 0.25})
    trackers.close()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("tree", [{"tensorboard": True}, {"wandb_project": "lens"}])
def test_missing_packages_are_refused_at_once(tree: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_installed", lambda package: False)
    with pytest.raises(UsageError, match="not installed"):
        strict.build(TrackingConfig, tree, "run.yaml")
