"""What CUDA and NCCL read in the environment when a process first uses them, so that it has to be there before.

CUDA_DEVICE_MAX_CONNECTIONS=1 is what Megatron-Core asks for where a layer's communication should overlap its arithmetic.
With one queue a GPU before Blackwell runs kernels in the order in which they were launched, communication first; from
Blackwell on it is not needed. Results are the same with and without.

NCCL_CUMEM_ENABLE=0 is for a trainer that broadcasts to SGLang servers, because SGLang sets it so for itself where nobody
has. The two ends of a group on one machine offer each other memory in the way that this chooses, and one that gets what
it did not expect fails, or waits until the time is up. Read in SGLang 0.5.21's source; not run on a GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lens_megatron.machine import run_command
from lens_megatron.mcore.layout import ParallelConfig

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig

KERNEL_ORDER, PEER_MEMORY = "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE"
_BLACKWELL = 10.0


def prepare(layout: ParallelConfig, run: RunConfig | None = None) -> None:
    """For this process and those that it starts. What the user has set stays. `run`: of one that syncs weights."""
    if KERNEL_ORDER not in os.environ and layout.tp * layout.cp > 1:
        capability = compute_capability()
        if capability is not None and capability < _BLACKWELL:
            os.environ[KERNEL_ORDER] = "1"
    if run is not None and _broadcasts_to_sglang(run):
        os.environ.setdefault(PEER_MEMORY, "0")


def compute_capability() -> float | None:
    """The lowest of this machine's GPUs; None where nothing says."""
    asked = run_command(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    if asked is None or not asked.ok:
        return None
    try:
        return min(map(float, asked.text.split()), default=None)
    except ValueError:  # "[N/A]"
        return None


def _broadcasts_to_sglang(run: RunConfig) -> bool:
    to_servers = run.placement == "disaggregated" and run.rollout.engine == "sglang"
    return to_servers and run.rollout.sync.transport in ("auto", "distributed")
