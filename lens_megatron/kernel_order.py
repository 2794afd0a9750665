"""CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron-Core asks for where a layer's communication should overlap its arithmetic.

With one queue a GPU before Blackwell runs kernels in the order in which they were launched, communication first; from
Blackwell on it is not needed. Results are the same with and without. It has to be in the environment before CUDA starts
in a process, so this looks at the GPU past CUDA.
"""

from __future__ import annotations

import os

from lens_megatron.machine import run_command
from lens_megatron.mcore.layout import ParallelConfig

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10.0


def prepare(layout: ParallelConfig) -> None:
    """For this process and those that it starts. What the user has set stays."""
    if NAME in os.environ or layout.tp * layout.cp == 1:
        return
    capability = compute_capability()
    if capability is not None and capability < _BLACKWELL:
        os.environ[NAME] = "1"


def compute_capability() -> float | None:
    """The lowest of this machine's GPUs; None where nothing says."""
    asked = run_command(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    if asked is None or not asked.ok:
        return None
    try:
        return min(map(float, asked.text.split()), default=None)
    except ValueError:  # "[N/A]"
        return None
