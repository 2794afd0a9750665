"""examples/qwen3-8b: what docs/first-day.md takes to a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launchers.servers import servers_of
from launchers.shape import job_shape
from launchers.site import load_site
from lens_megatron.cli import main
from lens_megatron.config import load_run
from lens_megatron.data.rows import read_rows
from lens_megatron.model_spec import load_model_spec

FOLDER = Path(__file__).parents[1] / "examples" / "qwen3-8b"
RUN = FOLDER / "RUN.yaml"
GRPO = ["algorithm=grpo", "run_dir=runs/grpo-8b"]
ON_HALF = ["parallel.dp=4", "rollout.servers=8"]


@pytest.mark.parametrize(
    ("overrides", "nodes", "seconds"),  # a step by `plan`; docs/first-day.md says those of LENS
    [([], 4, 58), (GRPO, 4, 56), (ON_HALF, 2, 76), ([*GRPO, *ON_HALF], 2, 72)],
    ids=["lens", "grpo", "lens on two nodes", "grpo on two nodes"],
)
def test_the_run_fills_its_nodes_and_fits(
    overrides: list[str], nodes: int, seconds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, site = load_run(RUN, overrides), load_site(FOLDER / "site.yaml")
    shape = job_shape(load_model_spec(config.model), config.parallel, site, servers_of(config))
    assert (shape.nodes, shape.gpus_in_use) == (nodes, 8 * nodes)
    assert main(["plan", str(RUN), "--gpus", str(8 * nodes), "--gpu", "h100", *overrides]) == 0
    (step,) = re.findall(r"^  step +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert round(float(step)) == seconds


def test_the_baseline_differs_in_its_algorithm_alone() -> None:
    lens, grpo = load_run(RUN, []), load_run(RUN, GRPO)
    assert lens.algorithm.rescue.mode == "purification" and grpo.algorithm.rescue.mode == "none"
    for section in ("data", "rollout", "optimizer", "update", "parallel", "evaluation", "seed", "steps"):
        assert getattr(lens, section) == getattr(grpo, section), section


def test_prompts_from_solutions(tmp_path: Path) -> None:
    solutions = {"a": r"Not \boxed{2} but \boxed{3}.", "b": "no box", "c": r"So \boxed{\frac{1}{2}}."}
    (tmp_path / "algebra").mkdir()
    for split, rows in (("train", solutions), ("test", {"t": r"\boxed{1}"})):
        table = pa.table({"problem": list(rows), "solution": list(rows.values())})
        pq.write_table(table, tmp_path / "algebra" / f"{split}-00000-of-00001.parquet")
    script = [sys.executable, str(FOLDER / "make_prompts.py"), str(tmp_path)]
    out = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "c"]
    (tmp_path / "prompts.jsonl").write_text(out)
    assert [row.answer for row in read_rows(str(tmp_path / "prompts.jsonl"))] == ["3", r"\frac{1}{2}"]
