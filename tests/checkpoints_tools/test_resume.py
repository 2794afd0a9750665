"""Killed in the middle: nothing that loads; run again, it continues and the result is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import megatron_target, megatron_to_hf, streaming
from checkpoints_tools.streaming import Job, Unfinished
from lens_megatron import checkpoints
from lens_megatron.cli import main

Folder = Callable[[str], Path]
JOBS = {"hf-to-megatron": 39, "megatron-to-hf": 47}  # records; tensors


def killed(when: str, *arguments: Path | str) -> None:
    """The command in a process that kills itself after so many written tensors, or at a step of the completion."""
    child = os.fork()  # not a new interpreter: its imports would take longer than the test
    if child == 0:
        try:
            _plant_kill(when)
            main(["convert", *map(str, arguments)])
        finally:
            os._exit(0)  # not reached when killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _plant_kill(when: str) -> None:
    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    left = 15
    finished = Unfinished.finished

    def count(self: Unfinished, job: Job) -> None:
        nonlocal left
        finished(self, job)
        left -= 1
        if left == 0:
            kill()

    places: dict[str, list[tuple[Any, str, Any]]] = {
        "writing": [(Unfinished, "finished", count)],
        "completing": [(megatron_target, "write_small", kill), (megatron_to_hf, "write_small", kill)],
        "renaming": [(checkpoints, "complete", kill), (checkpoints, "sync", kill)],
    }
    for place, name, replacement in places[when]:
        setattr(place, name, replacement)


@pytest.mark.parametrize("when", ["writing", "completing", "renaming"])
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_killed_and_run_again(
    when: str, direction: str, hf: Folder, converted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    source = hf("qwen3") if direction == "hf-to-megatron" else converted("qwen3")
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    killed(when, direction, source, target)
    assert not target.exists() and partial.is_dir()
    for folder in (target, partial):
        if when != "renaming":  # then everything is there but its name
            assert main(["convert", "inspect", str(folder)]) == 2
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder)
    written: list[str] = []
    finished = Unfinished.finished
    monkeypatch.setattr(Unfinished, "finished", lambda self, job: (written.append(job.name), finished(self, job)))
    assert main(["convert", direction, str(source), str(target)]) == 0
    assert len(written) == {"writing": JOBS[direction] - 15, "completing": 0, "renaming": 0}[when]
    assert not partial.exists() and not (target / "journal").exists()
    assert main(["convert", "verify", str(hf("qwen3")), str(target)]) == 0


def test_another_source_or_dtype_or_boot_starts_over(
    hf: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    written: list[str] = []
    finished = Unfinished.finished
    monkeypatch.setattr(Unfinished, "finished", lambda self, job: (written.append(job.name), finished(self, job)))

    def again(source: Path, *options: str, boot: str = "") -> int:
        written.clear()
        killed("writing", "hf-to-megatron", hf("qwen3"), target)
        if boot:
            monkeypatch.setattr(streaming, "_boot", lambda: boot)
        assert main(["convert", "hf-to-megatron", str(source), str(target), *options]) == 0
        assert main(["convert", "verify", str(source), str(target), "--no-logits"]) == (1 if options else 0)
        (target / "manifest.json").unlink()
        target.rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")
        return len(written)

    assert again(hf("qwen3")) == JOBS["hf-to-megatron"] - 15
    assert again(hf("qwen3"), "--dtype", "bfloat16") == JOBS["hf-to-megatron"]
    assert again(hf("llama")) == 31
    assert again(hf("qwen3"), boot="another") == JOBS["hf-to-megatron"]


def test_a_torn_line_of_the_journal_is_not_believed(
    hf: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, journal = tmp_path / "target", tmp_path / "target.partial" / "journal"
    killed("writing", "hf-to-megatron", hf("qwen3"), target)
    lines = journal.read_text().splitlines()
    assert len(lines) == 16
    journal.write_text("\n".join(lines))  # the last tensor's line has no end: it was being written
    written: list[str] = []
    finished = Unfinished.finished
    monkeypatch.setattr(Unfinished, "finished", lambda self, job: (written.append(job.name), finished(self, job)))
    assert main(["convert", "hf-to-megatron", str(hf("qwen3")), str(target)]) == 0
    assert lines[-1] in written and not set(lines[1:-1]) & set(written)
    assert main(["convert", "verify", str(hf("qwen3")), str(target), "--no-logits"]) == 0
