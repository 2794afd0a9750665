"""Rates measured on the device at hand, for a calibration file. Each is the best of a few runs: what a plan should count with
is what the machine can do, not what its neighbours left of it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F

from lens_megatron.planning.gpus import GPUS

_REPEATS = 5


def calibrate(device: torch.device | None = None) -> tuple[str, dict[str, Any]]:
    """(kind, its entry in the file). Links between GPUs are not measured by one process."""
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = where.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    rates = {
        "matmul": _matmul(where, dtype, 8192 if cuda else 384),
        "attention": _attention(where, dtype, 4096 if cuda else 256),
        "bandwidth": _bandwidth(where, 2**30 if cuda else 2**25),
    }
    if cuda:
        rates["host"] = _host(where, 2**28)
    name = torch.cuda.get_device_name(where) if cuda else platform.processor() or platform.machine()
    entry = {
        "rates": rates,
        "dtype": str(dtype).removeprefix("torch."),
        "device": name,
        "machine": platform.platform(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    return kind_of(name) if cuda else "cpu", entry


def kind_of(device_name: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100. A device that no plan knows goes by its own name."""
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    return next((kind for kind in GPUS if kind in words), device_name)


def _best_seconds(work: Callable[[], object], where: torch.device) -> float:
    work()  # warm up, and choose kernels
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(where)
        start = time.perf_counter()
        work()
        _wait(where)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _matmul(where: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, where)


def _attention(where: torch.device, dtype: torch.dtype, length: int) -> float:
    """Causal, 32 heads of 128 (8 on CPU); half of the products are needed, and counted."""
    heads = 32 if where.type == "cuda" else 8
    q, k, v = (torch.randn(1, heads, length, 128, device=where, dtype=dtype) for _ in range(3))
    seconds = _best_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), where)
    return 4 * heads * 128 * length * length / 2 / seconds


def _bandwidth(where: torch.device, size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), where)


def _host(where: torch.device, size: int) -> float:
    """From pageable memory, as weights come from the host."""
    source = torch.empty(size, dtype=torch.uint8)
    target = torch.empty(size, dtype=torch.uint8, device=where)
    return size / _best_seconds(lambda: target.copy_(source), where)
