"""What MODEL of `eval` stands for: an HF model, a Megatron checkpoint, or a run with all its saved steps."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron import checkpoints, strict
from lens_megatron.errors import UsageError
from lens_megatron.folder_note import NOTE
from lens_megatron.model_spec import (
    ModelSpec,
    find_weights,
    load_model_config,
    named_template,
    template_origin,
)

_WHOLE_BYTES = 64 * 2**20  # files up to here are hashed whole
_SAMPLES, _SAMPLE_BYTES = 16, 2**20  # of larger ones, as many pieces


@dataclass(frozen=True)
class EvalModel:
    """name: of files. title: in tables. source: an HF folder, or a Megatron checkpoint."""

    name: str
    title: str
    source: Path
    spec: ModelSpec
    template: str
    template_from: str  # for people: who says that this is the template
    megatron: bool = False
    step: int | None = None

    @property
    def tokenizer(self) -> Path:
        return self.source / "hf" if self.megatron else self.source

    def weights_id(self) -> str:
        """Tells these weights from others: names, sizes and contents of their files, large ones by samples."""
        digest = hashlib.blake2b(digest_size=12)
        kinds = ("*.distcp", ".metadata") if self.megatron else ("*.safetensors", "config.json")
        for path in sorted(found for kind in kinds for found in self.source.glob(kind)):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                if size <= _WHOLE_BYTES:
                    digest.update(file.read())
                    continue
                for number in range(_SAMPLES):
                    file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    @contextmanager
    def hf_folder(self, beside: Path) -> Iterator[Path]:
        """The weights as an HF folder; a checkpoint's is made in `beside` and removed afterwards."""
        if not self.megatron:
            yield self.source
            return
        from checkpoints_tools.megatron_to_hf import megatron_to_hf
        from checkpoints_tools.streaming import default_workers

        target = beside / f"{self.name}.hf"
        if target.exists():  # of an evaluation that was killed: nobody knows whether of these weights
            shutil.rmtree(target)
        megatron_to_hf(self.source, target, None, default_workers())
        try:
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)


def find_models(model: str) -> list[EvalModel]:
    """One, or those of a run: its first policy and every saved step."""
    folder = Path(model)
    if (folder / checkpoints.MANIFEST).is_file():
        return [_checkpoint(folder, _run_template(folder.resolve().parent.parent), None)]
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return _run(folder)
    config = load_model_config(model)
    source = find_weights(model)
    name = "_".join(source.resolve().parts[-2:]) if folder.is_dir() else model.replace("/", "_")
    return [EvalModel(name, model.rstrip("/"), source, config.spec, config.template, config.template_from)]


def run_rewards(model: str) -> dict[str, Any] | None:
    """The rules that judged in training, where `model` is a run's folder or a checkpoint in one."""
    folder = Path(model)
    run = folder.resolve().parent.parent if (folder / checkpoints.MANIFEST).is_file() else folder
    path = run / "config.yaml"
    return strict.read_yaml(path).get("rewards") if path.is_file() and (run / "checkpoints").is_dir() else None


def _run(folder: Path) -> list[EvalModel]:
    template = _run_template(folder)
    whole, broken = checkpoints.newest_first(folder / "checkpoints")
    if not whole:
        reasons = "; ".join(one.reason for one in broken)
        raise UsageError(f"{folder}: no whole checkpoint in checkpoints/{f' ({reasons})' if reasons else ''}")
    steps = [_checkpoint(found.folder, template, found.manifest.step) for found in reversed(whole)]
    run = strict.read_yaml(folder / "config.yaml")
    first = str(run.get("model", ""))
    try:
        config, source = load_model_config(first), find_weights(first)
    except UsageError:
        return steps  # the run's first policy is not on this machine; its steps are
    template = template or (config.template, config.template_from)
    return [EvalModel("step_000000", "step 0", source, config.spec, *template, step=0), *steps]


def _run_template(folder: Path) -> tuple[str, str] | None:
    """What the run's prompts looked like, and who says so; older checkpoints of base models do not."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    tree = strict.read_yaml(path)
    if (own := (tree.get("data") or {}).get("template")) is not None:
        return named_template(str(own), ""), template_origin("the run's data.template", str(own), "")
    try:
        config = load_model_config(str(tree.get("model")))
    except UsageError:
        return None
    return config.template, f"the run's model: {config.template_from}"


def _checkpoint(folder: Path, template: tuple[str, str] | None, step: int | None) -> EvalModel:
    manifest = checkpoints.read_manifest(folder)
    if (reason := checkpoints.damage(folder, manifest)) is not None:
        raise UsageError(f"{folder}: damaged: {reason}; use another checkpoint")
    config = load_model_config(folder / "hf")
    title = f"step {step}" if step is not None else str(folder)
    name = folder.name if step is not None else "_".join(folder.resolve().parts[-3:]).replace("_checkpoints_", "_")
    if template is None or (folder / "hf" / NOTE).exists():  # the run's model may have been replaced since
        template = config.template, config.template_from
    return EvalModel(name, title, folder, config.spec, *template, True, step)
