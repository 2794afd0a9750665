"""The whole study, reduced: from nothing to the page, by the commands that its README names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.study import analysis, report

pytestmark = [pytest.mark.long]
REPOSITORY = Path(__file__).parents[2]
STUDY = str(REPOSITORY / "examples" / "study" / "REDUCED.yaml")


def command(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_nothing_to_the_page(tmp_path: Path) -> None:
    command(tmp_path, "examples.study.make", "steps=200", "optimizer.warmup_steps=20")
    data, page, images = tmp_path / "data", tmp_path / "study.md", tmp_path / "img"
    assert "2/2" in command(tmp_path, "lens_megatron.cli", "study", STUDY)
    assert "2 of 2 cells are done already" in command(tmp_path, "lens_megatron.cli", "study", STUDY)
    collected = command(tmp_path, "examples.study.collect", "--study", f"main={STUDY}", "--data", str(data))
    assert "2 finished runs" in collected
    page.write_text(report.MARKED.sub(r"\1\3", report.PAGE.read_text()))
    command(tmp_path, "examples.study.report", "--data", str(data), "--page", str(page), "--images", str(images))

    runs = analysis.load_runs(data)
    assert {arm: list(seeds) for arm, seeds in runs.items()} == {"grpo": [0], "lens": [0]}
    for seeds in runs.values():
        assert [step for step, _ in seeds[0].curve(analysis.PRIMARY)] == [0, 2, 4, 6]
        assert [step for step, _ in seeds[0].curve("success")] == [1, 2, 3, 4, 5, 6]
    grpo, lens = (runs[arm][0] for arm in ("grpo", "lens"))
    assert grpo.values("purified_ratio") == [0.0] * 6
    # before the first update policy and reference are one: nothing to delete; from then on there is
    assert lens.values("purified_ratio")[0] == 0.0 and max(lens.values("purified_ratio")) > 0
    chance = lens.values("purification/planted_chance")
    assert chance and all(0.005 < value < 0.08 for value in chance)  # one or two words of some seventy
    # one seed, one start: the same base model answers the same questions
    assert grpo.curve(analysis.PRIMARY)[0] == lens.curve(analysis.PRIMARY)[0]
    assert grpo.values("success")[0] == lens.values("success")[0]
    for name in ("ends", "contrasts", "peak", "deletion"):
        block = next((m.group(0) for m in report.MARKED.finditer(page.read_text()) if m.group(2) == name), "")
        assert not block or re.search(r"^\| lens", block, re.MULTILINE), name
    assert (images / "noisy.svg").read_text().count("<polyline") == 2
