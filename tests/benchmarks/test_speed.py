"""benchmarks/gpu.py runs whole but for CUDA itself; what it and step_cpu.py count is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu, step_cpu
from benchmarks._gpu_bench import Bench, Row, guarded
from benchmarks._work import math_lengths, padded_packs, train_flops
from lens_megatron.model_spec import load_model_spec


def test_every_part_runs_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found["parts"]) == list(gpu.PARTS) and found["smoke"]
    assert all(rows and not any("failed" in row for row in rows) for rows in found["parts"].values())
    assert all(row["ok"] for row in found["parts"]["correct"])
    packed, padded = found["parts"]["step"]
    assert packed["with padding"] == packed["tokens"] <= padded["with padding"]
    assert {row["asynchronous"] for row in found["parts"]["checkpoint"]} == {True, False}
    printed = capsys.readouterr().out
    assert all(f"\n{name} (" in printed for name in gpu.PARTS)


def test_one_part_that_fails_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> list[Row]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "correct", broken)
    file = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--parts", "correct,matmul", "--json", str(file)]) == 1
    parts = json.loads(file.read_text())["parts"]
    assert parts["correct"] == [{"failed": "RuntimeError: no such kernel"}] and parts["matmul"][0]["tflops"] > 0
    assert "failed in: correct" in capsys.readouterr().out


def test_out_of_memory_is_a_result() -> None:
    def too_much() -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert guarded(too_much) == {"out of memory": True}
    assert "failed" in guarded(lambda: {}["missing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_only_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "--smoke" in capsys.readouterr().err


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), room=st.integers(0, 100))
def test_padded_packs(lengths: list[int], room: int) -> None:
    """Every sequence once, each as long as its micro-batch's longest, none over the budget."""
    budget = max(lengths) + room
    packs = padded_packs(lengths, budget)
    assert sorted(index for pack in packs for index in pack.sequences) == list(range(len(lengths)))
    for pack in packs:
        assert set(pack.padded_lengths) == {max(lengths[index] for index in pack.sequences)}
        assert pack.tokens <= budget


@given(total=st.integers(10, 10_000), longest=st.integers(4, 2000))
def test_lengths_stay_within_their_bounds(total: int, longest: int) -> None:
    lengths = math_lengths(total, longest)
    assert lengths and max(lengths) <= max(4, longest) and sum(lengths) <= max(total, 4)


def test_flops_of_a_known_model() -> None:
    """qwen3-0.6b: 440 M weights in its layers, 156 M in its head."""
    spec = load_model_spec("qwen3-0.6b")
    weights = 28 * (1024 * (16 + 8 + 8 + 16) * 128 + 3 * 1024 * 3072) + 1024 * 151_936
    assert train_flops(spec, [1]) == pytest.approx(6 * weights, rel=1e-3)
    # causal attention: half of length^2, two products, 2,048 wide, forward and twice backward
    quadratic = train_flops(spec, [4000]) - 4000 * train_flops(spec, [1])
    assert quadratic == pytest.approx(28 * 3 * 2 * 2 * 2048 * 4000**2 / 2, rel=1e-3)


def test_step_cpu_in_small(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    assert step_cpu.main(["--rounds", "1", "--budget", "64", "--tokens", "32", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["packed"]["padded tokens"] >= found["packed"]["tokens"] > 0
    assert found["packed"]["ratio"] > 0 and found["head"]["memory ratio"] > 1
