"""What is in a checkpoint, from its small files alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from checkpoints_tools.sources import HfSource, find_checkpoint
from lens_megatron import checkpoints, strict
from lens_megatron.errors import UsageError
from lens_megatron.mcore import checkpoint_index
from lens_megatron.mcore.checkpoint_index import Stored
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.parameters import count_parameters

_OPTIMIZER = "optimizer."
_SHOWN_METRICS = ("reward", "success")


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Plain values, fit for JSON. A damaged checkpoint is described too, with what is wrong."""
    found = find_checkpoint(path)
    return _megatron(found.folder) if found.name == "megatron" else _hf(found.folder)


def _megatron(folder: Path) -> dict[str, Any]:
    manifest = checkpoints.read_manifest(folder)
    spec = strict.build(ModelSpec, manifest.model, str(folder / checkpoints.MANIFEST))
    damage = checkpoints.damage(folder, manifest)
    stored = {} if damage and checkpoint_index.FILE in damage else checkpoint_index.read(folder)
    kinds = {"weights": 0, "optimizer": 0, "other": 0}
    for name, entry in stored.items():
        kinds[_kind(name, entry)] += entry.bytes
    weights = [entry for name, entry in stored.items() if _kind(name, entry) == "weights"]
    return {
        "path": str(folder),
        "format": "megatron",
        "whole": damage is None,
        "damage": damage,
        "step": manifest.step,
        "layout": manifest.layout,
        "world_size": manifest.world_size,
        "dtype": manifest.dtype,
        "stored_dtypes": sorted({entry.dtype.name for entry in weights if entry.dtype}),
        "optimizer": manifest.optimizer,
        "parameters": count_parameters(spec),
        "bytes": {**kinds, "total": sum(manifest.files.values())},
        "model": manifest.model,
        "metrics": manifest.metrics,
        "trainer": {} if damage else checkpoint_index.read_common(folder).get("trainer", {}),
        "version": manifest.version,
        "run_config": _run_config(folder),
        "files": manifest.files,
        "tensors": {name: _tensor(entry) for name, entry in stored.items() if entry.dtype is not None},
    }


def _hf(folder: Path) -> dict[str, Any]:
    source = HfSource(folder)
    sizes = {name: math.prod(shape) * source.dtype(name).itemsize for name, shape in source.shapes.items()}
    dtypes = sorted({source.dtype(name).name for name in source.shapes})
    return {
        "path": str(folder),
        "format": "hf",
        "whole": True,
        "damage": None,
        "dtype": max(dtypes, key=lambda kind: sum(sizes[n] for n in sizes if source.dtype(n).name == kind)),
        "stored_dtypes": dtypes,
        "optimizer": False,
        "parameters": count_parameters(source.spec),
        "bytes": {"weights": sum(sizes.values()), "total": sum(sizes.values())},
        "model": strict.to_tree(ModelSpec, source.spec),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "tensors": {
            name: {"shape": list(shape), "dtype": source.dtype(name).name, "bytes": sizes[name]}
            for name, shape in source.shapes.items()
        },
    }


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for people."""
    rows = [("checkpoint", found["path"]), ("format", found["format"])]
    if not found["whole"]:
        rows.append(("DAMAGED", found["damage"]))
    if found["format"] == "megatron":
        layout = " ".join(f"{name}{size}" for name, size in found["layout"].items() if size != 1) or "one process"
        rows += [("step", str(found["step"])), ("written by", f"{layout} (world size {found['world_size']})")]
    model = found["model"]
    shape = f"{model['family']}, {model['layers']} layers, hidden {model['hidden_size']}"
    shape += f", {model['moe']['experts']} experts" if model.get("moe") else ""
    rows += [
        ("model", f"{shape}, vocabulary {model['vocab_size']:,}{', tied' if model['tied'] else ''}"),
        ("parameters", f"{found['parameters']:,}"),
        ("dtype", ", ".join(found["stored_dtypes"]) or found["dtype"]),
        ("optimizer", "yes" if found["optimizer"] else "no"),
    ]
    rows += [(f"{name} bytes", f"{size:,}") for name, size in found["bytes"].items()]
    rows += [(name, str(value)) for name, value in found.get("trainer", {}).items() if name.endswith("_step")]
    rows += _few_metrics(found)
    if found.get("run_config"):
        rows.append(("run config", found["run_config"]["path"]))
    if found.get("version"):
        rows.append(("lens-megatron", found["version"]))
    return rows


def _few_metrics(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A step has a hundred of them."""
    metrics = found.get("metrics", {})
    shown = {name: metrics[name] for name in (*_SHOWN_METRICS, _keep_best(found)) if name in metrics}
    rows = [(name, f"{value:.6g}") for name, value in shown.items()]
    if more := len(metrics) - len(shown):
        rows.append(("metrics", f"{more} more, with --json F"))
    return rows


def _keep_best(found: dict[str, Any]) -> str:
    """The metric that the run keeps its best checkpoint by. Its config.yaml may be anybody's."""
    values = (found.get("run_config") or {}).get("values")
    section = values.get("checkpoint") if isinstance(values, dict) else None
    name = section.get("keep_best") if isinstance(section, dict) else None
    return name if isinstance(name, str) else ""


def _kind(name: str, entry: Stored) -> str:
    if name.startswith(_OPTIMIZER):
        return "optimizer"
    return "weights" if entry.dtype is not None and not name.startswith("rng.") else "other"


def _tensor(entry: Stored) -> dict[str, Any]:
    assert entry.dtype is not None
    return {"shape": list(entry.shape), "dtype": entry.dtype.name, "bytes": entry.bytes, "chunks": len(entry.chunks)}


def _run_config(folder: Path) -> dict[str, Any] | None:
    """config.yaml of the run that the checkpoint lies in."""
    path = folder.resolve().parent.parent / "config.yaml"
    if folder.resolve().parent.name != "checkpoints" or not path.is_file():
        return None
    try:
        return {"path": str(path), "values": strict.read_yaml(path)}
    except UsageError as error:
        return {"path": str(path), "error": str(error)}
