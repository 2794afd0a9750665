"""What needs no run: the recorder, what a check of RUN.yaml asks for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from lens_megatron import recorder
from lens_megatron.config import load_run
from lens_megatron.guards import checks
from lens_megatron.guards.config import ModelGuardConfig


def test_not_a_number_passes_no_bound() -> None:
    assert checks.over(math.nan, 1.0)
    with pytest.raises(checks.GuardFailed, match="logprob_diff"):
        checks.engine_difference(math.nan, None, 1.0, 1.0)
    with pytest.raises(checks.GuardFailed, match="hf_parity"):
        checks.hf_parity("policy", "m", torch.tensor([math.nan]), torch.tensor([0.0]), 1.0)


def test_the_bound_of_a_probe_of_unlikely_tokens() -> None:
    bounds = ModelGuardConfig()
    assert bounds.for_probe("bf16", 2.0) == bounds.within_trainer("bf16") == 0.05
    assert bounds.for_probe("bf16", 14.0) == pytest.approx(0.14)
    assert bounds.for_probe("fp32", 14.0) == 0.001
    assert ModelGuardConfig(logprob_tolerance=0.01).for_probe("bf16", 14.0) == 0.01
    for size in (math.inf, math.nan):  # an impossible token lets nothing else pass
        assert bounds.for_probe("bf16", size) == 0.05


def test_the_recorder_keeps_the_last_events_and_survives_a_torn_line(tmp_path: Path) -> None:
    first = recorder.Recorder(tmp_path, 3)
    for step in range(2000):
        first.record(step, "train", 0.5)
    del first  # killed: nothing is closed
    again = recorder.Recorder(tmp_path, 3)
    again.record(2000, "save")
    path = recorder.path_of(tmp_path, 3)
    events = recorder.read(path)
    assert [event.number for event in events] == list(range(2001 - recorder._LINES, 2001))
    assert (events[-1].what, events[-1].seconds, events[-2].step, events[-2].seconds) == ("save", None, 1999, 0.5)
    path.write_bytes(path.read_bytes().replace(b" save", b"\0\0\0\0\0"))
    assert recorder.read(path)[-1].step in (1999, 2000)


def test_a_check_is_small_and_keeps_the_layout(tmp_path: Path) -> None:
    from lens_megatron.commands.check import tiny

    path = tmp_path / "RUN.yaml"
    tree = {"model": "qwen3-8b-base", "run_dir": "runs/x", "data": {"train": "p.jsonl"}}
    tree["algorithm"] = {"preset": "dapo", "filter": {"size_factor": 2.0}}  # which without a filter would be refused
    path.write_text(yaml.safe_dump({**tree, "parallel": {"tp": 4, "pp": 2}}))
    config = load_run(path, [])
    small = tiny(config)
    assert (small.steps, small.parallel, small.rollout.engine) == (2, config.parallel, config.rollout.engine)
    assert small.run_dir == "runs/x.check"
    assert small.rollout.max_response_tokens == 16
    assert small.algorithm.filter.mode == "none"


@pytest.mark.parametrize(
    "key", ["logprob_diff=0", "replicas_every=-1", "most_left_out=0", "probe_tokens=1", "hf_party=1"]
)
def test_bad_guards_are_refused(tmp_path: Path, key: str) -> None:
    from lens_megatron.errors import UsageError

    path = tmp_path / "RUN.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "run_dir": "r", "data": {"train": "p"}, "algorithm": "lens"}))
    with pytest.raises(UsageError, match="guards"):
        load_run(path, [f"guards.{key}"])
