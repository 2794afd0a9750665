"""The runs of a report, as loaded from their folders, and what tells them apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        runs.append(Run(name, folder.read_config(), folder.read_versions(), metrics, folder))
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
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [(key, [tree.get(key, "not set") for tree in flat]) for key in keys if key != "run_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat
