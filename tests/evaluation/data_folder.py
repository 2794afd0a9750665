"""Where the benchmarks' files are, on a machine that has them. They are never shipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def benchmark_folder() -> Path:
    named = os.environ.get("LENS_MEGATRON_BENCHMARKS")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
    if not (folder / "math500.jsonl").is_file():
        pytest.skip(f"no benchmark files in {folder}; LENS_MEGATRON_BENCHMARKS names the folder that has them")
    return folder
