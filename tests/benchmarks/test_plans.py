"""docs/plans.md against the code that writes it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plans
from lens_megatron.model_spec import shipped_models


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    """All rows are there; those that compute quickly are compared."""
    text = (Path(__file__).parents[2] / "docs" / "plans.md").read_text()
    assert plans.documented_models() and all(not name.startswith("tiny") for name in plans.documented_models())
    assert len(plans.documented_models()) == len([name for name in shipped_models() if "tiny" not in name])
    for model in plans.documented_models():
        for gpus in plans.COUNTS:
            assert text.count(f"| {model} | {gpus} | ") == 1
    quick = [("qwen3-0.6b", 1), ("qwen3-8b-base", 8), ("qwen3-8b-base", 256), ("llama-3.1-70b", 64)]
    for model, gpus in [*quick, ("qwen3-30b-a3b", 8), ("qwen3-235b-a22b", 8)]:
        assert plans.plan_row(model, gpus) in text
    for row in plans.sync_rows():
        assert row in text
    assert "| qwen3-8b-base | lens | 726 s | " in text
