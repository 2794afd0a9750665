"""What a trainer does before its models, and what it keeps of a run that rounded elsewhere."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lens_megatron import trainer
from lens_megatron.config import RunConfig
from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore import checkpoint_run, runtime
from lens_megatron.mcore.layout import ParallelConfig


class ModelsWouldBeBuilt(Exception):
    pass


@pytest.mark.parametrize("rank", [0, 1])
def test_the_engine_is_waited_for_by_all_ranks_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    """Rank 0 must not wait for servers while the others wait in a process group that knows timeout_s alone."""
    done: list[str] = []

    def host(*_: Any) -> Any:
        done.append("driver spawned")
        driver = SimpleNamespace(started=lambda: done.append("driver started"))
        return SimpleNamespace(driver=driver, close=lambda: done.append("host closed"))

    def from_rank_zero(work: Any, what: str, silence_s: float) -> Any:
        done.append(f"all wait for rank 0 to {what}")
        return work() if rank == 0 else None

    def build(*_: Any, **__: Any) -> None:
        raise ModelsWouldBeBuilt

    replaced = {"Host": host, "from_rank_zero": from_rank_zero, "build_trainable": build}
    watch = SimpleNamespace(
        reporting=nullcontext, doing=lambda *_: nullcontext(), close=lambda: done.append("watch closed")
    )
    replaced["Watch"] = lambda *_: watch
    replaced["find_weights"] = lambda *_: None
    replaced["Recorder"] = lambda *_: SimpleNamespace(record=lambda *_: None)
    for name, value in replaced.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(runtime, "initialize", lambda *_: done.append("joined"))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    config: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(keep_best=None),
        rollout=SimpleNamespace(engine="embedded"),
        placement="disaggregated",
        **{"model": "m", "parallel": None, "seed": 0, "timeout_s": 9.0, "run_dir": str(tmp_path), "precision": "auto"},
        **{"optimizer": None, "steps": 1, "memory": None},
    )
    with pytest.raises(ModelsWouldBeBuilt):
        trainer.Trainer(config, SimpleNamespace(spec=None), tmp_path if rank == 0 else None)  # type: ignore[arg-type]
    together = ["joined", "all wait for rank 0 to start the engine"]
    of_rank_0 = ["driver spawned", *together, "driver started", "host closed"]
    assert done == [*(of_rank_0 if rank == 0 else together), "watch closed"]


@pytest.mark.parametrize("error", [OSError("no space left"), RunError("no driver"), UsageError("no data")])
def test_an_error_before_the_ranks_meet_is_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def host(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer, "Host", host)
    monkeypatch.setattr(trainer, "find_weights", lambda *_: tmp_path)
    config: Any = SimpleNamespace(checkpoint=SimpleNamespace(keep_best=None), model="m", run_dir=str(tmp_path / "run"))
    with pytest.raises(type(error), match=str(error)):
        trainer.Trainer(config, SimpleNamespace(spec=None), tmp_path)  # type: ignore[arg-type]
    stacks = tmp_path / "run" / "logs" / "stacks" / "rank_00000.txt"
    if isinstance(error, UsageError):  # bad input leaves nothing behind
        assert not stacks.exists()
    else:
        assert f"reason: rank 0 failed: {error}" in stacks.read_text()
        assert "in host" in stacks.read_text()


def test_scores_are_of_the_dtype_and_device_that_auto_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(precision: str, device: str) -> Any:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
        monkeypatch.setattr(runtime, "device", lambda: torch.device(device))
        config: Any = SimpleNamespace(precision=precision, parallel=ParallelConfig())
        return trainer._rounding(config)

    assert rounding("auto", "cpu") == rounding("fp32", "cpu") != rounding("bf16", "cpu")
    assert rounding("auto", "cuda") == rounding("bf16", "cuda") != rounding("fp32", "cuda")
    assert rounding("fp32", "cpu") != rounding("fp32", "cuda")
    assert RunConfig.__dataclass_fields__["precision"].default == "auto"


@pytest.mark.parametrize(
    "layout, dtype, same", [("A", "bfloat16", True), ("B", "bfloat16", False), ("A", "float32", False)]
)
def test_what_was_measured_in_another_dtype_or_layout_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, dtype: str, same: bool
) -> None:
    found = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(step=3, layout=layout, dtype=dtype))
    for name, value in {
        "looked_at": lambda action: ([found], []),
        "load": lambda policy, folder: {},
        "layout_of": lambda policy: "A",
        "dtype_of": lambda policy: "bfloat16",
    }.items():
        monkeypatch.setattr(checkpoint_run, name, value)
    resumed = checkpoint_run.resume(None, tmp_path)  # type: ignore[arg-type]
    assert resumed is not None and resumed.same_rounding == same


@pytest.mark.parametrize(
    "error, rescued",
    [
        (RunError("guard"), True),
        (UsageError("reward"), True),
        (RuntimeError("[gloo/transport] Connection closed by peer"), False),  # nobody is left to complete it with
        (KeyboardInterrupt(), False),
        (SystemExit(143), False),
    ],
)
def test_a_save_under_way_is_completed_after_an_error_of_all_ranks(error: BaseException, rescued: bool) -> None:
    done: list[str] = []
    one: Any = object.__new__(trainer.Trainer)
    one.watch = SimpleNamespace(doing=lambda *_: nullcontext())
    one._saver = SimpleNamespace(rescue=lambda: done.append("rescued"), rescue_limit_s=1.0)
    with pytest.raises(type(error)), one.rescuing():
        raise error
    assert done == ["rescued"] * rescued
    with one.rescuing():
        pass
    assert done == ["rescued"] * rescued


def test_steps_without_any_reward_are_told_once() -> None:
    notes: list[str] = []
    one: Any = object.__new__(trainer.Trainer)
    one._without_reward, one.progress = 0, SimpleNamespace(note=notes.append)
    for reward in (0.0, 0.0, 0.5, 0.0, 0.0):
        one._note_steps_without_reward({"reward": reward})
    assert notes == []
    for _ in range(5):
        one._note_steps_without_reward({"reward": 0.0})
    assert len(notes) == 1 and "every reward of the last 3 steps was 0" in notes[0]
