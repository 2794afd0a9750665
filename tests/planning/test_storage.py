"""What a run holds on shared storage, by hand and against checkpoints that runs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lens_megatron.config import load_run
from lens_megatron.model_spec import load_model_config
from lens_megatron.planning.describe import storage_lines
from lens_megatron.planning.storage import Stored, stored_by_run
from tests.loop.runs import run_tree, train, write_run, write_task

SPEC = load_model_config("qwen3-8b-base").spec
PARAMETERS = 8_190_735_360


def stored(tmp_path: Path, files: bool = False, **changes: Any) -> dict[str, Stored]:
    run = write_run(tmp_path, run_tree(tmp_path, tmp_path / "run", **changes))
    return {one.name: one for one in stored_by_run(load_run(run, []), SPEC, files)}


@pytest.mark.parametrize(
    ("steps", "checkpoint", "most"),
    [
        (300, {"every": 20, "keep": 2}, 3),  # and the one that is being written
        (300, {"every": 20, "keep": 2, "keep_best": "reward"}, 4),
        (300, {"every": 0, "keep": 1}, 2),  # at the end of a job and at the end of the run
        (2, {"every": 1, "keep": 3}, 2),
    ],
)
def test_checkpoints(tmp_path: Path, steps: int, checkpoint: dict[str, Any], most: int) -> None:
    found = stored(tmp_path, steps=steps, checkpoint=checkpoint)
    assert found == {"checkpoints": Stored("checkpoints", 14 * PARAMETERS, most)}
    assert storage_lines(list(found.values()))[1:] == [f"  checkpoints   {most * 114.67:>9.2f}  {most} of 114.67"]


@pytest.mark.parametrize(("hf_keep", "most"), [(None, 6), (2, 3)])
def test_copies_and_the_engines_weights(tmp_path: Path, hf_keep: int | None, most: int) -> None:
    checkpoint = {"every": 0, "hf_every": 50, "hf_keep": hf_keep}
    found = stored(tmp_path, files=True, steps=300, checkpoint=checkpoint)
    assert found["HF copies"] == Stored("HF copies", 2 * PARAMETERS, most)
    assert found["engine weights"] == Stored("engine weights", 2 * PARAMETERS, 3)
    assert sum(one.bytes for one in found.values()) == PARAMETERS * (4 * 14 + 2 * most + 6)
    assert storage_lines(list(found.values()))[-1].startswith("  sum ")


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path, precision: str) -> None:
    """Of a model that is large beside the files' own headers."""
    task = write_task(tmp_path / "task", hidden_size=256, intermediate_size=1024, head_dim=32)
    tree = run_tree(task, tmp_path / "run", steps=1, precision=precision, checkpoint={"every": 1})
    train(tmp_path, tree)
    config = load_run(tmp_path / "RUN.yaml", [])
    [planned] = stored_by_run(config, load_model_config(config.model).spec, files=False)
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    assert planned.most == 1
    assert planned.bytes < written < 1.02 * planned.bytes
