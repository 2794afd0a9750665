"""What the planner says of a cell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lens_megatron.errors import UsageError
from lens_megatron.model_spec import load_model_config
from lens_megatron.planning.gpus import find_gpu, rates_of
from lens_megatron.planning.plans import Plan, make_plan
from lens_megatron.planning.search import engine_tp_for
from lens_megatron.planning.setups import engine_gpus, setup_of_run, starts_colocated_servers
from lens_megatron.planning.work import workload_of_run
from lens_megatron.studies.config import Cell, Study


def plan_of_cell(study: Study, cell: Cell, response_tokens: float | None = None) -> Plan:
    """In the cell's layout. An embedded engine's simulated cell takes turns with servers on all GPUs.

    `response_tokens`: the mean that was measured, so that what is compared is the planner and not its guess.
    """
    if study.config.gpu is None:
        raise UsageError("study: simulated cells and plans need a kind of GPU: set gpu")
    gpu = find_gpu(study.config.gpu)
    rates = rates_of(gpu, Path(study.config.calibration) if study.config.calibration else None)
    spec = load_model_config(cell.config.model).spec
    work = workload_of_run(cell.config, response_tokens=response_tokens)
    setup = setup_of_run(cell.config, spec, gpu, rates, work, cell.processes + engine_gpus(cell.config))
    if starts_colocated_servers(cell.config):  # those that it would start, be they too few
        servers = cell.config.rollout.servers
        if servers * setup.engine_tp > cell.processes:
            raise UsageError(
                f"cell {cell.name}: rollout.servers: {servers} servers of {setup.engine_tp} GPUs do not fit on the trainer's "
                f"{cell.processes}"
            )
        setup = dataclasses.replace(setup, engine_gpus=servers * setup.engine_tp)
    if cell.where == "simulated" and setup.placement == "embedded":
        tp = engine_tp_for(spec, gpu, cell.processes)
        if tp is None:
            raise UsageError(
                f"cell {cell.name}: an engine of {cell.config.model} does not fit on {cell.processes} GPUs"
            )
        setup = dataclasses.replace(
            setup, placement="colocated", engine_gpus=cell.processes, engine_tp=tp, slots=type(setup).slots
        )
    return make_plan(setup)
