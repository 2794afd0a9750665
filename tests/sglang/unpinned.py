"""sglang.launch_server on a machine without a GPU, returning experts: SGLang pins the memory that it notes them in by CUDA.

Run as a file by the server's python. The scheduler's process, which is spawned, reads this file again, and so has it too.
"""

from __future__ import annotations

import runpy
from typing import Any

import torch
from sglang.srt.mem_cache.pool_host import common


def unpinned(dims: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return torch.empty(dims, dtype=dtype)


common.ALLOC_MEMORY_FUNCS["cpu"] = unpinned

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
