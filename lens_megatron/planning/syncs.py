"""By which way new weights reach the engine, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.gpus import Rates
from lens_megatron.planning.parameters import count_parameters

SyncWay = Literal["broadcast", "host memory", "requests", "files"]
_BUCKET_BYTES, _BUCKET_SECONDS = 256 * 1024**2, 0.01  # of a broadcast: a request and an answer for each; assumed
_PICKLED = 30  # times as slow as shared memory, on CPU: docs/weight-sync.md


@dataclass(frozen=True)
class Sync:
    """`rollout.sync:` of a run, as far as it matters here."""

    transport: Literal["auto", "distributed", "tensor", "disk"] = "auto"
    staged: bool = False  # servers with pipeline stages, of which a broadcast reaches the first alone
    in_memory: bool = False  # the folder for files is in /dev/shm

    def way(self, colocated: bool, nodes: int) -> SyncWay:
        """What a run takes, where colocated servers on several nodes are a Slurm job's."""
        transport = self.transport
        if transport == "auto":
            files = self.staged or (colocated and nodes > 1)
            transport = "disk" if files else "tensor" if colocated else "distributed"
        if transport == "distributed":
            return "broadcast"
        if transport == "disk":
            return "host memory" if self.in_memory else "files"
        return "host memory" if nodes == 1 else "requests"


AUTOMATIC = Sync()


def sync_seconds(spec: ModelSpec, layout: ParallelConfig, rates: Rates, nodes: int, way: SyncWay) -> float:
    """Of all weights in 16 bits."""
    size = 2.0 * count_parameters(spec)
    if way == "files":  # written by rank 0, read again by it, and read by the nodes of the servers at the same time
        return 3 * size / rates.disk
    if way == "broadcast":  # every pipeline stage sends its own, over the network when that is between
        rate = rates.link if nodes == 1 else rates.network
        return size / layout.pp / rate + size / _BUCKET_BYTES * _BUCKET_SECONDS
    # one tensor at a time to rank 0's host, into shared memory, and to the engine's device
    return 3 * size / rates.host * (_PICKLED if way == "requests" else 1)
