"""What the interpreter cannot show of the head's kernels: that Triton makes Hopper's tensor-core code of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

COMPILE = """
import json
from dataclasses import asdict
from benchmarks.head_compiled import compiled
from lens_megatron.mcore import head_kernels, head_triton
kernels = (head_kernels.statistics_kernel, head_kernels.gradient_kernel)
print(json.dumps([asdict(compiled(kernel, head_triton._HOPPER, hidden=2560)) for kernel in kernels]))
"""


def test_the_kernels_compile_for_hopper_onto_its_tensor_cores(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in json.loads(done.stdout.splitlines()[-1]):
        assert kernel["tensor_core_products"] >= 4, kernel
        assert kernel["spilled_bytes"] <= 128, kernel  # 104 by triton 3.6, none by 3.7
        assert kernel["blocks_a_processor"] >= 1, kernel
