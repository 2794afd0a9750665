"""From a run's configuration to what a plan is computed from."""

from __future__ import annotations

import dataclasses

from lens_megatron.config import RunConfig
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.activations import CUDA, ENGINE
from lens_megatron.planning.gpus import Gpu, Rates
from lens_megatron.planning.plans import Setup
from lens_megatron.planning.syncs import Sync
from lens_megatron.planning.work import Workload


def engine_gpus(config: RunConfig) -> int:
    """That the servers take for themselves."""
    if config.rollout.engine == "embedded" or config.placement == "colocated":
        return 0
    return config.rollout.servers * config.rollout.server.gpus


def starts_colocated_servers(config: RunConfig) -> bool:
    rollout = config.rollout
    return config.placement == "colocated" and rollout.engine == "sglang" and not rollout.server.urls


def sync_of_run(config: RunConfig) -> Sync:
    rollout = config.rollout
    staged = int(str(rollout.server.argument("pp_size") or 1)) > 1
    return Sync(rollout.sync.transport, staged, in_memory=(rollout.sync.folder or "").startswith("/dev/shm/"))


def setup_of_run(
    config: RunConfig, spec: ModelSpec, gpu: Gpu, rates: Rates, work: Workload, gpus: int, engine_kernels: bool = False
) -> Setup:
    """The run's own layout on `gpus` GPUs in all; engine servers, where it has any, on their part of them. Colocated ones on
    all, whatever number RUN.yaml has for its own GPUs."""
    run = Setup(
        spec,
        gpu,
        rates,
        work,
        config.parallel,
        trainer_gpus=gpus,
        placement="embedded",
        engine_gpus=1,
        engine_tp=1,
        recompute=config.memory.recompute,
        offload_reference=config.memory.offload_reference,
        offload_optimizer=config.memory.offload_optimizer,
        slots=config.rollout.slots,
        kernels=ENGINE if engine_kernels else CUDA,
    )
    if config.rollout.engine == "embedded":
        return run
    run = dataclasses.replace(run, engine_tp=config.rollout.server.gpus, slots=Setup.slots, sync=sync_of_run(config))
    if config.placement == "colocated":
        return dataclasses.replace(run, placement="colocated", engine_gpus=gpus)
    servers = engine_gpus(config)
    if servers >= gpus:
        raise UsageError(f"--gpus {gpus}: the engine's servers alone take {servers}; name the trainer's as well")
    return dataclasses.replace(run, placement="disaggregated", trainer_gpus=gpus - servers, engine_gpus=servers)
