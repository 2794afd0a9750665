"""docs/library.md: every example runs as printed, in a process that never loads Megatron-Core."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_every_example_runs_without_megatron() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 4
    checks = "import sys\nassert 'megatron' not in sys.modules and 'transformers' not in sys.modules\n"
    source = "\n".join([*examples, checks])
    done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
