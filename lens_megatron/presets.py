"""Presets: YAML files of values for the four slots, and for the run where a paper fixes them.

`algorithm:` in a RUN.yaml is a preset's name, a path to a file like one, or {preset: NAME or path, ...changes}.
A file holds any of `base` (another preset to start from), `filter`, `rescue`, `advantage`, `loss`, and `run`: values in
the shape of a RUN.yaml, which the run's own values override.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron import strict
from lens_megatron.errors import UsageError

if TYPE_CHECKING:
    from lens_megatron.algorithms.algorithm import AlgorithmConfig

FOLDER = Path(__file__).parent / "algorithms" / "presets"
Choice = str | Mapping[str, Any]


def preset_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_algorithm(choice: Choice, where: str = "algorithm") -> AlgorithmConfig:
    """The algorithm that a RUN.yaml's `algorithm:` names."""
    from lens_megatron.algorithms.algorithm import AlgorithmConfig

    tree = _resolve(choice, where)
    tree.pop("run", None)
    return strict.build(AlgorithmConfig, tree, where)


def preset_run_values(choice: Choice, where: str = "algorithm") -> dict[str, Any]:
    """What the preset's paper fixes outside the algorithm, as a partial RUN.yaml to merge the run's own values onto."""
    run = _resolve(choice, where).get("run") or {}
    if not isinstance(run, dict):
        raise UsageError(f"{where}: run: expected keys and values, found {type(run).__name__}")
    return run


def _resolve(choice: Choice, where: str) -> dict[str, Any]:
    """Preset and changes as one mapping, bases merged in."""
    if isinstance(choice, str):
        return _load(choice, where, Path(), ())
    if not isinstance(choice, Mapping):
        raise UsageError(f"{where}: expected a preset's name or {{preset: NAME, ...}}, found {type(choice).__name__}")
    changes = {key: value for key, value in choice.items() if key != "preset"}
    if "preset" not in choice:
        return strict.merge({}, changes)
    return strict.merge(_load(str(choice["preset"]), where, Path(), ()), changes)


def _load(name: str, where: str, folder: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name, where, folder)
    if path in above:
        chain = " -> ".join(p.stem for p in (*above, path))
        raise UsageError(f"{where}: presets that name each other as base: {chain}")
    tree = strict.read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UsageError(f"{path}: base: expected a preset's name, found {type(base).__name__}")
    return strict.merge(_load(base, str(path), path.parent, (*above, path)), tree)


def _find(name: str, where: str, folder: Path) -> Path:
    """A path if it looks like one, relative to the file that names it; else a shipped preset."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{where}: no preset file {path}")
        return path.resolve()
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, preset_names())
        near.sort(key=lambda other: sorted(other) != sorted(name))  # letters that changed places are the likeliest slip
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(preset_names())}"
        raise UsageError(f"{where}: no preset {name!r}; {hint}")
    return path.resolve()
