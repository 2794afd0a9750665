"""`rollout.sync:` of RUN.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class SyncConfig:
    """How the engine's servers get the trainer's weights.

    transport    auto: distributed, or tensor where trainer and servers share GPUs.
                 distributed: the trainer broadcasts to the servers' GPUs over NCCL (gloo on CPU).
                 tensor: as bytes over HTTP.
                 disk: safetensors in a folder that both see.
    fallback     what is tried once, for all servers that still answer, when the transport failed.
    in_flight    rollouts under way: wait lets the batch end first; abort starts them again; retract keeps their tokens and
                 computes the cache again; in_place goes on with a cache of the old weights (on servers with
                 disable_radix_cache and disable_overlap_schedule, which those that the run starts get).
    timeout_s    of one bucket, and of one request of the hand-over.
    scramble     the servers' weights are made random before each sync, so that one that never takes effect is plain to the
                 probe in any precision. Where the server offers it.
    checksums    the servers' own checksums are compared with the exported weights', where they can be (SGLang on CPU).
    probe_tolerance   largest difference of a probe token's log-prob, engine to trainer; null: 1e-4 in fp32, 0.5 in bf16; of
                 mixtures of experts in bf16, whose routers take other experts near ties, 3, and 0.15 on average.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    transport: Literal["auto", "distributed", "tensor", "disk"] = "auto"
    fallback: Literal["disk", "none"] = "disk"
    in_flight: Literal["wait", "abort", "retract", "in_place"] = "wait"
    bucket_mib: float = 256.0
    folder: str | None = None  # of disk: seen by all, gets a part for this run; default: RUN_DIR/weights
    # of the trainer's node as the servers see it, or a network interface of each of its nodes; for distributed; default: found
    address: str | None = None
    timeout_s: float = 300.0
    scramble: bool = True
    checksums: bool = True
    probe_tokens: int = 64
    probe_tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.bucket_mib <= 0:
            raise ValueError(f"bucket_mib is above 0 (got {self.bucket_mib})")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is above 0 (got {self.timeout_s})")
        if self.probe_tokens < 2:
            raise ValueError(f"probe_tokens is at least 2: the first token has no log-prob (got {self.probe_tokens})")
        if self.probe_tolerance is not None and self.probe_tolerance <= 0:
            raise ValueError(f"probe_tolerance is above 0 (got {self.probe_tolerance})")
