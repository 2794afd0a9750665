"""CUDA_DEVICE_MAX_CONNECTIONS, as the ranks of a run get it; nvidia-smi is a script here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lens_megatron import cuda_environment, workers
from lens_megatron.mcore.layout import ParallelConfig

TP, CP, DP = ParallelConfig(tp=2), ParallelConfig(cp=2), ParallelConfig(pp=2, dp=2)


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    monkeypatch.setenv(cuda_environment.KERNEL_ORDER, "before")  # put back after the test, whatever it does
    monkeypatch.delenv(cuda_environment.KERNEL_ORDER)
    return folder


def gpus(folder: Path, says: str, code: int = 0) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{says}'\nexit {code}\n")
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("says", "layout", "expected"),
    [
        ("9.0\\n9.0\\n", TP, "1"),
        ("8.0\\n", CP, "1"),
        ("9.0\\n", DP, None),
        ("10.0\\n10.0\\n", TP, None),  # not as text, where it would come before 9.0
        ("12.0\\n", TP, None),
        ("[N/A]\\n", TP, None),
        ("", TP, None),
    ],
)
def test_before_blackwell_with_layers_that_are_cut(
    path: Path, says: str, layout: ParallelConfig, expected: str | None
) -> None:
    gpus(path, says)
    cuda_environment.prepare(layout)
    assert os.environ.get(cuda_environment.KERNEL_ORDER) == expected


def test_without_a_gpu_and_with_a_broken_driver(path: Path) -> None:
    cuda_environment.prepare(TP)
    gpus(path, "9.0\\n", code=9)
    cuda_environment.prepare(TP)
    assert cuda_environment.KERNEL_ORDER not in os.environ


def test_what_the_user_has_set_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(path, "9.0\\n")
    monkeypatch.setenv(cuda_environment.KERNEL_ORDER, "8")
    cuda_environment.prepare(TP)
    assert os.environ[cuda_environment.KERNEL_ORDER] == "8"


@pytest.mark.parametrize("command", ["train", "check", "sft", "score", "analyze"])
def test_the_command_prepares_its_workers(
    path: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from lens_megatron import cli
    from tests.loop.runs import run_tree, write_run

    gpus(path, "9.0\\n")
    seen: list[tuple[str, str | None]] = []

    def run_workers(processes: int, arguments: list[str]) -> int:
        seen.append((arguments[0], os.environ.get(cuda_environment.KERNEL_ORDER)))
        return 0

    monkeypatch.setattr(workers, "run_workers", run_workers)
    monkeypatch.setattr("lens_megatron.endings.on_signals", lambda *_: seen.append(("on_signals", None)))
    monkeypatch.setattr("lens_megatron.stopping.hold_signal", lambda: None)
    tree = run_tree(task, tmp_path / "run")
    if command == "sft":
        tree = {name: tree[name] for name in ("model", "run_dir", "steps", "parallel", "data")}
    model, data = str(tree["model"]), str(tree["data"]["train"])
    words = {
        "score": ["--model", model, "--reference", model, "--prompt", "Hello", "parallel.tp=2"],
        "analyze": ["interference", model, "--reference", model, "--data", data, "parallel.tp=2"],
    }
    assert cli.main([command, *words.get(command, [str(write_run(tmp_path, tree))])]) == 0
    assert seen == [("on_signals", None), (command, "1")]
