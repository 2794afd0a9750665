"""The transports that a run tries, in order."""

from __future__ import annotations

from pathlib import Path

from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.delivery import Transport
from lens_megatron.rollout.weight_sync.disk import DiskTransport
from lens_megatron.rollout.weight_sync.distributed import DistributedTransport
from lens_megatron.rollout.weight_sync.snapshot import snapshot_folder
from lens_megatron.rollout.weight_sync.tensor import TensorTransport


def make_transports(
    config: SyncConfig,
    run_dir: Path,
    companions_from: Path,
    device: str,
    colocated: bool = False,
    only_disk_is_fast: bool = False,
) -> list[Transport]:
    """`companions_from`: the model's folder, for the config and tokenizer files beside weights on disk."""
    disk = DiskTransport(snapshot_folder(config, run_dir), companions_from)
    chosen: dict[str, Transport] = {
        "distributed": DistributedTransport("nccl" if device == "cuda" else "gloo", config.address),
        "tensor": TensorTransport(),
        "disk": disk,
    }
    automatic = "disk" if only_disk_is_fast else "tensor" if colocated else "distributed"
    first = chosen[automatic if config.transport == "auto" else config.transport]
    # colocated, the trainer's weights are gone when the probe fails: there is no second time
    return [first] if config.fallback == "none" or first is disk or colocated else [first, disk]
