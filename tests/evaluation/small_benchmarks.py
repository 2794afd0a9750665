"""Files of the seven benchmarks' sizes with problems made on the spot, where the real ones are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

from lens_megatron.evaluation.benchmarks import BENCHMARKS


def write_benchmarks(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place, benchmark in enumerate(BENCHMARKS.values()):
        rows = (
            {"id": f"{benchmark.name}/{i}", "problem": f"What is {i} + {place}?", "answer": str(i + place)}
            for i in range(benchmark.size)
        )
        (folder / benchmark.file_name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
