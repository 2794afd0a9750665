"""STUDY.yaml: a base run, axes that are crossed, named arms; and the cells that follow from them."""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lens_megatron import strict
from lens_megatron.config import RunConfig, load_run
from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import check_layout
from lens_megatron.model_spec import ModelConfig, find_weights, load_model_config
from lens_megatron.planning.gpus import GPUS, find_gpu, rates_of
from lens_megatron.planning.setups import starts_colocated_servers

Where = Literal["local", "slurm", "simulated"]
Grid = dict[str, list[Any]]
Finder = Callable[[RunConfig, Where], ModelConfig]
_STRICT: dict[str, Any] = {"extra": "forbid"}
_SPECIAL = ("nodes", "scaling")  # axes that are no key of RUN.yaml
_MOST_CELLS = 10_000


@dataclass(frozen=True)
class Arm:
    """A named set of changes. `grid` replaces axes of the study's for this arm: fewer seeds, for instance."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    name: str
    set: dict[str, Any] = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)
    where: Where | None = None


@dataclass(frozen=True)
class Target:
    """For the cost of reaching an accuracy."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    value: float
    metric: str = "success"
    window: int = 1  # steps whose mean must reach it: one lucky batch is no accuracy

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is at least 1 (got {self.window})")


@dataclass(frozen=True)
class StudyConfig:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    run: str  # the RUN.yaml that all cells change, beside STUDY.yaml
    study_dir: str
    name: str = ""
    where: Where = "local"
    at_once: int = 1  # cells that run side by side; on Slurm, jobs in the queue
    grid: Grid = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)
    gpus_a_node: int = 8  # of `nodes`
    gpu: str | None = None  # kind, for utilisation and for plans
    calibration: str | None = None  # measured rates for plans
    site: str | None = None  # SITE.yaml, on Slurm
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.gpus_a_node < 1:
            raise ValueError("at_once and gpus_a_node are at least 1")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: a name twice: {next(name for name in names if names.count(name) > 1)!r}")
        if "arm" in self.grid:
            raise ValueError("grid.arm: arms have a list of their own, `arms`")


@dataclass(frozen=True)
class Cell:
    name: str
    labels: dict[str, Any]  # axis -> value; the arm's name under `arm`
    overrides: tuple[str, ...]  # of RUN.yaml, without run_dir
    where: Where
    run_dir: Path
    config: RunConfig

    @property
    def processes(self) -> int:
        return self.config.parallel.processes


@dataclass(frozen=True)
class Study:
    config: StudyConfig
    run: Path
    folder: Path
    site: Path | None
    cells: tuple[Cell, ...]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Every cell is built as its run would be: a bad grid is one line, before anything starts."""
    config = strict.build(StudyConfig, strict.apply_overrides(strict.read_yaml(path), overrides), str(path))
    run = path.parent / config.run
    folder = Path(config.study_dir)
    arms = [(arm, {**config.grid, **arm.grid}) for arm in config.arms or [Arm("")]]
    for arm, grid in arms:
        _check_grid(grid, f"{path}: {f'arm {arm.name}: ' if arm.name else ''}grid")
    if sum(math.prod(len(values) for values in grid.values()) for _, grid in arms) > _MOST_CELLS:
        raise UsageError(f"{path}: more than {_MOST_CELLS} cells: leave out values of an axis")
    site = path.parent / config.site if config.site else None
    on_slurm = "slurm" in (arm.where or config.where for arm, _ in arms)
    model_of = _finder(site if on_slurm else None)
    cells = []
    for arm, grid in arms:
        for values in itertools.product(*grid.values()):
            labels = ({"arm": arm.name} if arm.name else {}) | dict(zip(grid, values, strict=True))
            cells.append(_cell(config, path, run, folder, arm, grid, labels, model_of))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path}: two cells are the same: {twice}: an axis lists a value twice")
    if any(cell.where == "simulated" for cell in cells):
        _check_gpu(config, path)
    return Study(config, run, folder, site, tuple(cells))


def _check_gpu(config: StudyConfig, path: Path) -> None:
    """Before real cells have trained for hours."""
    if config.gpu is None:
        raise UsageError(f"{path}: simulated cells need a kind of GPU: set gpu, one of {', '.join(GPUS)}")
    try:
        rates_of(find_gpu(config.gpu), Path(config.calibration) if config.calibration else None)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _finder(site: Path | None) -> Finder:
    """Shapes of models; weights are looked for where the cell will: on Slurm the site says."""

    def model_of(run: RunConfig, where: Where) -> ModelConfig:
        if view is not None and where == "slurm":
            from launchers.inputs import find_models

            key = run.model, run.reference if run.algorithm.needs_reference else None
            if key not in found:  # cells are many, their models few, and each has thousands of tensors
                found[key] = find_models(run, replace(view, run_dir=Path(run.run_dir).absolute()))
            return found[key]
        model = load_model_config(run.model)
        if where != "simulated":
            find_weights(run.model)
        return model

    view = None
    found: dict[tuple[str, str | None], ModelConfig] = {}
    if site is not None:
        from launchers.inputs import View
        from launchers.site import load_site

        view = View(load_site(site), Path.cwd(), Path.cwd())
    return model_of


def _check_grid(grid: Mapping[str, list[Any]], where: str) -> None:
    for axis, values in grid.items():
        if not values:
            raise UsageError(f"{where}.{axis}: an empty list leaves no cell: give at least one value")
    for nodes in grid.get("nodes", []):
        if not isinstance(nodes, int) or nodes < 1:
            raise UsageError(f"{where}.nodes: whole numbers above 0 (got {nodes!r})")
    for scaling in grid.get("scaling", []):
        if scaling not in ("strong", "weak"):
            raise UsageError(f"{where}.scaling: strong or weak (got {scaling!r})")
    if "scaling" in grid and "nodes" not in grid:
        raise UsageError(f"{where}.scaling: needs the axis nodes: it says what happens to the batch as they grow")


def _cell(
    config: StudyConfig,
    path: Path,
    run: Path,
    folder: Path,
    arm: Arm,
    grid: Grid,
    labels: dict[str, Any],
    model_of: Finder,
) -> Cell:
    name = "-".join(_word(key, value) for key, value in labels.items()) or "run"
    where = arm.where or config.where
    place = f"{path}: cell {name}"
    axes = {key: value for key, value in labels.items() if key not in (*_SPECIAL, "arm")}
    if both := axes.keys() & arm.set.keys():
        key = min(both)
        raise UsageError(
            f"{path}: arm {arm.name} sets {key}, which is an axis too: give the arm `grid: {{{key}: [...]}}`"
        )
    # a whole section before its keys, whoever gives them
    changes = dict(sorted({**axes, **arm.set}.items(), key=lambda change: change[0].count(".")))
    run_dir = folder / "cells" / name
    try:
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        loaded = load_run(run, [*overrides, f"run_dir={json.dumps(str(run_dir))}"])
        model = model_of(loaded, where)
        if "nodes" in labels:
            overrides += _scaled(config, loaded, labels, min(grid["nodes"]), "rollout.servers" in changes)
            loaded = load_run(run, [*overrides, f"run_dir={json.dumps(str(run_dir))}"])
        check_layout(model.spec, loaded.parallel, loaded.parallel.processes)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None
    return Cell(name, labels, tuple(overrides), where, run_dir, loaded)


def _scaled(
    config: StudyConfig, run: RunConfig, labels: Mapping[str, Any], fewest: int, servers_given: bool
) -> list[str]:
    """Nodes become data parallelism; colocated servers, unless the study gives them, and under weak scaling the batch grow
    with it."""
    gpus = labels["nodes"] * config.gpus_a_node
    dp, left = divmod(gpus, run.parallel.model_ranks)
    if left:
        raise UsageError(f"{gpus} GPUs are no multiple of tp x pp x cp = {run.parallel.model_ranks}")
    changed = [f"parallel.dp={dp}"]
    if starts_colocated_servers(run) and not servers_given:
        before = run.parallel.dp or max(1, fewest * config.gpus_a_node // run.parallel.model_ranks)
        changed.append(f"rollout.servers={max(1, run.rollout.servers * dp // before)}")
    if labels.get("scaling") == "weak":
        prompts, left = divmod(run.data.prompts_per_step * labels["nodes"], fewest)
        if left:
            raise UsageError(
                f"{run.data.prompts_per_step} prompts cannot grow from {fewest} to {labels['nodes']} nodes"
            )
        changed.append(f"data.prompts_per_step={prompts}")
    return changed


def _word(key: str, value: Any) -> str:
    """seed 3 -> seed3; optimizer.lr 1e-6 -> lr1e-06; names as they are. A value that is no word is told by its digest."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rstrip("/").rpartition("/")[2] if "/" in text else text
    if isinstance(value, (dict, list)):
        text = str(value.get("preset", "")) if isinstance(value, dict) else ""
        text += f"{_digest(value):04x}"
    text = re.sub(r"[^A-Za-z0-9.+_]+", "_", text)
    short = key.rpartition(".")[2]
    return text if key in ("arm", "model", "algorithm", "scaling") else f"{short}{text}"


def _digest(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode()) & 0xFFFF
