"""The tidy tables of a study: a row per cell and step, and a row per cell."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lens_megatron.errors import UsageError
from lens_megatron.model_spec import load_model_config
from lens_megatron.planning.gpus import find_gpu
from lens_megatron.planning.plans import Plan
from lens_megatron.planning.work import training_flops
from lens_megatron.reporting import figures
from lens_megatron.reporting.runs import Run, is_number
from lens_megatron.run_folder import RunFolder
from lens_megatron.studies.config import Cell, Study, Target
from lens_megatron.studies.planned import plan_of_cell
from lens_megatron.studies.states import CellState, read_state

PHASES = (*figures.PHASES, "other")


@dataclass(frozen=True)
class Result:
    """A cell with what it left behind. `gpus` counts processes on a machine without GPUs."""

    cell: Cell
    state: CellState
    run: Run | None  # None: no step, or simulated
    plan: Plan | None
    gpus: int
    on_gpus: bool

    @property
    def simulated(self) -> bool:
        return self.cell.where == "simulated"


def collect(study: Study) -> list[Result]:
    return [_result(study, cell) for cell in study.cells]


def _result(study: Study, cell: Cell) -> Result:
    state = read_state(study, cell)
    run, on_gpus = None, cell.where == "simulated"
    folder = RunFolder(cell.run_dir)
    if cell.where != "simulated" and folder.metrics_path.exists() and (metrics := folder.read_metrics()):
        versions = folder.read_versions()
        run = Run(cell.name, folder.read_config(), versions, metrics, folder)
        machine = versions.get("machine")
        on_gpus = isinstance(machine, Mapping) and bool(machine.get("gpus"))
    plan = None
    if study.config.gpu is not None and (run is not None or cell.where == "simulated"):
        measured = run.values("response_tokens") if run is not None else []
        try:
            plan = plan_of_cell(study, cell, mean(measured) if measured else None)
        except UsageError:
            plan = None
    gpus = plan.setup.gpus if plan is not None else cell.processes
    return Result(cell, state, run, plan, gpus, on_gpus)


def cell_row(study: Study, result: Result) -> dict[str, Any]:
    """What is not known is None; a simulated cell has the planner's values, and says so."""
    row: dict[str, Any] = {"cell": result.cell.name, **{k: _plain(v) for k, v in result.cell.labels.items()}}
    row |= {
        "state": result.state.state,
        "reason": result.state.reason,
        "source": "simulated" if result.simulated else "measured",
        "gpus": result.gpus,
        "processors": "gpu" if result.on_gpus else "cpu",
    }
    known = _planned(result.plan) if result.simulated else _measured(study, result)
    names = ("steps", "step_seconds", "tokens_per_second_per_gpu", "mfu", "gpu_hours", "gpu_hours_to_target", "success",
             *(f"seconds/{phase}" for phase in PHASES))  # fmt: skip
    row |= {name: known.get(name) for name in names}
    row["planned_step_seconds"] = None if result.plan is None else result.plan.step_seconds
    row["planned_on"] = study.config.gpu if result.plan is not None else None
    row["study_seconds"] = result.state.seconds
    return row


def _planned(plan: Plan | None) -> dict[str, Any]:
    if plan is None or not plan.fits:
        return {}
    phases = {f"seconds/{'reward' if phase == 'verify' else phase}": value for phase, value in plan.seconds.items()}
    rate = plan.generation.tokens / plan.step_seconds / plan.setup.gpus
    return {"step_seconds": plan.step_seconds, "tokens_per_second_per_gpu": rate, "mfu": plan.mfu, **phases}


def _measured(study: Study, result: Result) -> dict[str, Any]:
    run = result.run
    if run is None:
        return {}
    values: dict[str, Any] = {"steps": int(run.metrics[-1]["step"])}
    success = figures.first_and_last(run.values("success"))
    values["success"] = None if success is None else success[1]
    time = figures.step_time(run)
    if time is None:
        return values
    values["step_seconds"] = time.mean
    values |= {f"seconds/{phase}": seconds for phase, seconds in time.phases.items() if phase in PHASES}
    later = run.metrics[1:] if len(run.metrics) > 1 else run.metrics
    tokens = [float(line["tokens"]) for line in later if is_number(line.get("tokens"))]
    if tokens and time.mean > 0:
        values["tokens_per_second_per_gpu"] = mean(tokens) / time.mean / result.gpus
    total = figures.seconds_until(run, float("inf"))
    if total is not None:
        values["gpu_hours"] = total * result.gpus / 3600
    values["gpu_hours_to_target"] = hours_to_target(run, study.config.target, result.gpus)
    values["mfu"] = _utilisation(study, result, time.phases.get("train"))
    return values


def hours_to_target(run: Run, target: Target | None, gpus: int) -> float | None:
    """GPU-hours until the mean of the last `window` steps reaches the target; None when it never does."""
    if target is None:
        return None
    points = run.points(target.metric)
    for place in range(target.window - 1, len(points)):
        window = [value for _, value in points[place + 1 - target.window : place + 1]]
        if mean(window) >= target.value:
            seconds = figures.seconds_until(run, points[place][0])
            return None if seconds is None else seconds * gpus / 3600
    return None


def _utilisation(study: Study, result: Result, train_seconds: float | None) -> float | None:
    """Of the training phase, against the data sheet; only where a GPU of the named kind did the work."""
    if result.run is None or study.config.gpu is None or not result.on_gpus or not train_seconds:
        return None
    config = result.cell.config
    length = mean(result.run.values("response_tokens")) + min(160, config.data.max_prompt_tokens)
    tokens = config.data.prompts_per_step * config.rollout.n * length * config.update.epochs
    flops = training_flops(load_model_config(config.model).spec, tokens, length)
    return flops / train_seconds / result.gpus / find_gpu(study.config.gpu).matmul


def step_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        if result.run is None:
            continue
        labels = {key: _plain(value) for key, value in result.cell.labels.items()}
        rows += [{"cell": result.cell.name, **labels, **line} for line in result.run.metrics]
    return rows


def write_tables(study: Study, results: Sequence[Result]) -> None:
    """cells.csv and .parquet, steps.csv and .parquet, in the study's folder."""
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        _write(study.folder, "cells", [cell_row(study, result) for result in results])
        _write(study.folder, "steps", step_rows(results))
    except OSError as error:
        raise UsageError(f"study_dir {study.folder} cannot be written: {error.strerror or error}") from None


def _write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    table = pyarrow.table({column: _column([row.get(column) for row in rows]) for column in columns})
    pq.write_table(table, folder / f"{name}.parquet")


def _column(values: list[Any]) -> list[Any]:
    """One type a column: numbers as floats where they are mixed, else everything as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return values


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) or value is None else json.dumps(value)
