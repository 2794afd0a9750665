"""The runs of a report, as loaded from their folders, and what tells them apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lens_megatron import strict
from lens_megatron.errors import UsageError
from lens_megatron.run_folder import RunFolder

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    folder: RunFolder | None = None
    earlier: Sequence[tuple[int | None, Mapping[str, Any]]] = ()  # configurations before `config`: until which step

    def points(self, name: str) -> list[Point]:
        """(step, value) where the value is known."""
        return [(float(line["step"]), float(line[name])) for line in self.metrics if is_number(line.get(name))]

    def steps(self) -> list[Mapping[str, Any]]:
        """Lines of steps that trained: an evaluation of the first policy has a line of its own, step 0."""
        return [line for line in self.metrics if line["step"] > 0]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]

    def metric_names(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    @property
    def algorithm(self) -> str:
        """The preset's name, or what the run calls itself."""
        choice = self.config.get("algorithm")
        if isinstance(choice, Mapping):  # resolved: the values, under the run's name
            choice = choice.get("preset") or self.config.get("name")
        return str(choice) if choice else ""


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    folders = [RunFolder.open(path) for path in paths]
    runs = []
    for name, folder in zip(short_names(paths), folders, strict=True):
        metrics = folder.read_metrics()
        if not metrics:
            raise UsageError(f"{folder.path}: no step has finished yet: there is nothing to report")
        runs.append(
            Run(name, folder.read_config(), folder.read_versions(), metrics, folder, folder.read_earlier_configs())
        )
    return runs


def short_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise UsageError("the same run folder is named twice")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def baseline(runs: Sequence[Run]) -> int:
    """What the others are compared with: the run of GRPO, by its preset or else by its name; else the first."""
    for place, run in enumerate(runs):
        if run.algorithm == "grpo":
            return place
    return next((place for place, run in enumerate(runs) if "grpo" in run.name.lower().split("/")[-1]), 0)


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all runs. Where the run was written is no difference."""
    flat = [_shown(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [(key, [tree.get(key, "not set") for tree in flat]) for key in keys if key != "run_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def config_changes(run: Run) -> list[tuple[str, str, str]]:
    """Keys that were changed when the run was resumed: name, earlier values and until when, value now."""
    used = in_force(run)
    if len(used) == 1:
        return []
    flat = [_shown(config) for config in _completed([config for _, config in used])]
    until = [f" until step {step}" if step is not None else "" for step, _ in used]
    rows = []
    for key in dict.fromkeys(key for tree in flat for key in tree if key != "run_dir"):
        values = [tree.get(key, "not set") for tree in flat]
        ends = [place for place, (value, following) in enumerate(pairwise(values)) if value != following]
        if ends:
            rows.append((key, ", ".join(f"{values[place]}{until[place]}" for place in ends), values[-1]))
    return rows


def in_force(run: Run) -> list[tuple[int | None, Mapping[str, Any]]]:
    """The configurations that the run's steps were made with, in order, and until which step; today's comes last. One of
    which no step is left, because the run was resumed from where that one began or before, is left out."""
    until: int | None = None
    ends: list[int | None] = []
    for end, _ in reversed(run.earlier):  # what was resumed from is the end of all that came before
        until = min((step for step in (end, until) if step is not None), default=None)
        ends.insert(0, end if end is None else until)
    begun, kept = 0, []
    for end, (_, config) in zip(ends, run.earlier, strict=True):
        if end is None or end > begun:
            kept.append((end, config))
            begun = end or begun
    return [*kept, (None, run.config)]


def _completed(configs: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What an older version's configuration does not say is the default, as for a resumed run. As they are where this
    version does not read one of them."""
    from lens_megatron.config import RunConfig

    try:
        return [strict.to_tree(RunConfig, strict.build(RunConfig, config, "config.yaml")) for config in configs]
    except UsageError:
        return configs


def _shown(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: "null" if value is None else str(value) for key, value in strict.flat(config).items()}
