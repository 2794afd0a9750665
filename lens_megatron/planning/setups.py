"""From a run's configuration to what a plan is computed from."""

from __future__ import annotations

import dataclasses
from typing import Any

from lens_megatron import strict
from lens_megatron.config import RunConfig
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.activations import CUDA, ENGINE
from lens_megatron.planning.gpus import Gpu, Rates
from lens_megatron.planning.plans import Setup
from lens_megatron.planning.work import Workload


def setup_of_run(
    config: RunConfig, spec: ModelSpec, gpu: Gpu, rates: Rates, work: Workload, gpus: int, engine_kernels: bool = False
) -> Setup:
    """The run's own layout on `gpus` GPUs; engine servers, where it has any, on their part of them."""
    if config.memory.offload_optimizer > 0:
        raise UsageError("memory.offload_optimizer: refused on CUDA until it is verified: set it to 0 to plan this run")
    tree: dict[str, Any] = strict.to_tree(RunConfig, config)
    rollout: dict[str, Any] = tree["rollout"]
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
        slots=rollout["slots"],
        kernels=ENGINE if engine_kernels else CUDA,
    )
    if rollout["engine"] == "embedded":
        return run
    server = rollout.get("server") or {}
    tp = int(server.get("tp", 1))
    run = dataclasses.replace(run, engine_tp=tp, slots=Setup.slots)
    if tree.get("placement") == "colocated":
        return dataclasses.replace(run, placement="colocated", engine_gpus=gpus)
    engine_gpus = int(rollout.get("servers", 1)) * tp * int(server.get("dp", 1))
    if engine_gpus >= gpus:
        raise UsageError(f"--gpus {gpus}: the engine's servers alone take {engine_gpus}; name the trainer's as well")
    return dataclasses.replace(run, placement="disaggregated", trainer_gpus=gpus - engine_gpus, engine_gpus=engine_gpus)
