"""GPU kinds in numbers, and the rates that a plan counts with: assumed shares of the peaks, or measured ones from a file.

Peaks are vendors' figures for dense bf16 and one direction of a link; memory is what the driver reports. Network is what such
nodes are usually sold with, one port a GPU: give `--network GB_PER_S` where yours differs. The shared file system is no part of
a node: what one node gets of it is assumed alike for all, and `--disk GB_PER_S` says better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_megatron import strict
from lens_megatron.errors import UsageError

TERA, GIGA, MIB = 10**12, 10**9, 1024**2


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    matmul: float  # FLOP/s
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the other GPUs of its node, one direction
    network: float  # bytes/s to other nodes, one direction
    host: float  # bytes/s to host memory, one direction
    source: str
    disk: float = 2 * GIGA  # bytes/s of a node to storage that all nodes share
    a_node: int = 8


def _gpu(name: str, mib: int, tflops: float, tb_s: float, link: float, net: float, host: float, source: str) -> Gpu:
    return Gpu(name, mib * MIB, tflops * TERA, tb_s * TERA, link * GIGA, net * GIGA, host * GIGA, source)


_NVML = "memory: NVML totals at thundergolfer.com/blog/nvidia-gpu-memory-capacity"
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 81_920, 312, 2.039, 300, 25, 32, f"NVIDIA A100 80GB SXM data sheet; {_NVML}"),
        _gpu("a800", 81_920, 312, 2.039, 200, 25, 32, "as a100, NVLink cut to 400 GB/s both ways (aiwiki.ai/wiki/nvidia_a800)"),
        _gpu("h100", 81_559, 989.4, 3.35, 450, 50, 64, f"NVIDIA H100 SXM data sheet; {_NVML}"),
        _gpu("h200", 143_771, 989.4, 4.8, 450, 50, 64, f"NVIDIA H200 SXM data sheet; {_NVML}"),
        _gpu("b200", 183_296, 2250, 8.0, 900, 50, 64, "HGX B200 at 1,000 W (glennklockwood.com/garden/processors/B200); 179 GiB"
             " as offered at docs.vultr.com/inference-cookbook"),
        _gpu("mi300x", 196_592, 1307.4, 5.3, 448, 50, 64, "AMD Instinct MI300X data sheet; 7 Infinity Fabric links of 64 GB/s"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What is reached. `measured`: the names of those that a calibration file gave; the others are assumed."""

    matmul: float
    attention: float
    bandwidth: float
    link: float
    network: float
    host: float
    disk: float
    measured: tuple[str, ...] = ()


# Shares of the peaks, assumed: large matrix products reach 60-80 % of the data sheet, flash attention about half of
# that, streaming kernels and collectives 70-85 %, copies from pageable host memory about 30 %.
_ASSUMED = {"matmul": 0.65, "attention": 0.4, "bandwidth": 0.75, "link": 0.7, "network": 0.7, "host": 0.3, "disk": 1.0}
CALIBRATED = tuple(_ASSUMED)
ROOM_FOR_ENGINE = 0.5  # of a card: the most that an engine's weights should take


def find_gpu(kind: str, network_gb_s: float | None = None, disk_gb_s: float | None = None) -> Gpu:
    if kind not in GPUS:
        raise UsageError(f"--gpu {kind}: not known; one of {', '.join(GPUS)}")
    for flag, given in (("--network", network_gb_s), ("--disk", disk_gb_s)):
        if given is not None and given <= 0:
            raise UsageError(f"{flag}: gigabytes a second, above 0 (got {given:g})")
    gpu = GPUS[kind]
    network = gpu.network if network_gb_s is None else network_gb_s * GIGA
    return replace(gpu, network=network, disk=gpu.disk if disk_gb_s is None else disk_gb_s * GIGA)


def assumed_rates(gpu: Gpu) -> Rates:
    return Rates(
        matmul=gpu.matmul * _ASSUMED["matmul"],
        attention=gpu.matmul * _ASSUMED["attention"],
        bandwidth=gpu.bandwidth * _ASSUMED["bandwidth"],
        link=gpu.link * _ASSUMED["link"],
        network=gpu.network * _ASSUMED["network"],
        host=gpu.host * _ASSUMED["host"],
        disk=gpu.disk * _ASSUMED["disk"],
    )


def rates_of(gpu: Gpu, calibration: Path | None = None) -> Rates:
    """Measured rates of this kind replace the assumed ones."""
    rates = assumed_rates(gpu)
    if calibration is None:
        return rates
    found = read_calibration(calibration).get(gpu.name)
    if found is None:
        raise UsageError(f"{calibration}: holds no measurement of {gpu.name}; make one there with plan --calibrate")
    values = {name: float(found["rates"][name]) for name in CALIBRATED if name in found["rates"]}
    return replace(rates, **values, measured=tuple(values))


def read_calibration(path: Path) -> Mapping[str, Any]:
    """{kind: {"rates": {name: per second}, "machine", "versions", "date"}}."""
    tree = strict.read_json(path)
    good = all(
        isinstance(one, dict)
        and isinstance(one.get("rates"), dict)
        and all(isinstance(rate, (int, float)) and rate > 0 for rate in one["rates"].values())
        for one in tree.values()
    )
    if not good:
        raise UsageError(f"{path}: not a calibration file: expected {{kind: {{rates: {{name: number above 0}}}}}}")
    return tree
