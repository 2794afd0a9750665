"""TensorBoard events hold what metrics.jsonl holds; what is not installed is refused when the configuration is read."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_one_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = Trackers(TrackingConfig(tensorboard=True), tmp_path, "run", {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
    (complaint,) = trackers.log({"step": 3, "reward": 0.25})
    assert complaint.startswith("tracking: tensorboard failed at step 3 and gets nothing from here on:")
    assert "No space left on device" in complaint
    assert trackers.log({"step": 4, "reward": 0.5}) == []
    assert trackers.close() == []


@pytest.mark.parametrize("fault", ["hangs", "raises"])
def test_one_that_cannot_be_closed_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A stand-in for wandb whose server does not answer any more."""
    answered = threading.Event()

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None: ...

        def finish(self) -> None:
            if fault == "raises":
                raise RuntimeError("no network")
            answered.wait()

    monkeypatch.setattr(tracking, "_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: Run()))  # type: ignore[arg-type]
    trackers = Trackers(TrackingConfig(tensorboard=False, wandb_project="lens"), tmp_path, "run", {})
    assert trackers.log({"step": 1, "reward": 0.25}) == []
    (complaint,) = trackers.close(limit_s=0.2)
    answered.set()
    said = {"hangs": "did not close within 0.2 s", "raises": "could not be closed: no network"}
    assert complaint.startswith("tracking: wandb") and said[fault] in complaint


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for wandb was started with."""
    calls: list[dict[str, Any]] = []
    quiet = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setattr(tracking, "_installed", lambda package: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **keys: calls.append(keys) or quiet))  # type: ignore[arg-type, func-returns-value]
    return calls


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    config = TrackingConfig(tensorboard=False, wandb_project="lens")
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Trackers(config, tmp_path / folder, "run", {}).close()
    first, again, other = (keys["id"] for keys in started)
    assert first == again != other and first.isalnum() and len(first) == 8
    assert all(keys["resume"] == "allow" for keys in started)
    assert started[0]["dir"] == str(tmp_path / "a" / "logs")


def test_an_id_that_cannot_be_kept_is_one_line(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    (tmp_path / "wandb_id").mkdir()
    with pytest.raises(UsageError, match=r"tracking\.wandb_project: wandb could not start: .*wandb_id"):
        Trackers(TrackingConfig(tensorboard=False, wandb_project="lens"), tmp_path, "run", {})
    assert started == []
