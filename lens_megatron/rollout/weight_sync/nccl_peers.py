"""NCCL_CUMEM_ENABLE=0 in a trainer that broadcasts to SGLang servers, because SGLang sets it so for itself where nobody has.

The two ends of a group on one machine offer each other memory in the way that this chooses, and one that gets what it did not
expect fails, or waits until the time is up. It has to be in the environment before NCCL's first communicator in a process.
Read in SGLang 0.5.21's source; not run on a GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig

NAME = "NCCL_CUMEM_ENABLE"


def prepare(config: RunConfig) -> None:
    """For this process and those that it starts. What the user has set stays."""
    broadcasts = config.placement == "disaggregated" and config.rollout.sync.transport in ("auto", "distributed")
    if config.rollout.engine == "sglang" and broadcasts:
        os.environ.setdefault(NAME, "0")
