"""What a run reads, looked for before its job is queued: a job may wait for hours to say that a file is not there.

Without a container a job sees what this machine sees. In one, a path is looked for where its mount comes from; what no
mount holds nobody here can see, and the job itself will say. Whatever is not looked for is passed over in silence.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launchers.script import all_mounts
from launchers.site import SiteConfig
from lens_megatron.config import RunConfig
from lens_megatron.data.files import FILE_KINDS, find_files, is_hub_id
from lens_megatron.data.rows import Row, read_rows
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.benchmarks import load_benchmark, select_benchmarks
from lens_megatron.mcore.hf_index import HfIndex
from lens_megatron.mcore.hf_names import hf_shapes
from lens_megatron.model_spec import (
    ModelConfig,
    ModelSpec,
    check_same_shape,
    find_weights,
    is_shipped,
    load_model_config,
)
from lens_megatron.rewards.answerable import check_answers, check_functions

_OF_THE_CACHE = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class View:
    """A job's files, as far as they can be seen from here."""

    site: SiteConfig
    run_dir: Path
    work_dir: Path

    def here(self, path: str | Path) -> Path | None:
        """Where a path of the job's is on this machine; None: it cannot be known."""
        given = Path(path).expanduser()
        if self.site.image is None:
            return given
        there = Path(os.path.normpath(self.work_dir / given))
        mounts = [mount.split(":")[:2] for mount in all_mounts(self.site, self.run_dir, self.work_dir)]
        holding = [(Path(source), Path(target)) for source, target in mounts if there.is_relative_to(target)]
        if not holding:
            return None
        source, target = max(holding, key=lambda mount: len(mount[1].parts))  # the innermost hides the others
        return source / there.relative_to(target) if source.exists() else None


def find_models(config: RunConfig, view: View) -> ModelConfig:
    """The policy's shape, and a look whether its weights, and those of a reference of its own, are whole where the job will
    look for them."""
    place = _place_of(config.model, view)
    model = load_model_config(place or config.model, _cache(view))
    if _visible(config.model, view):
        _look_into(place or config.model, model.spec, view)
    if config.reference is not None and config.algorithm.needs_reference and view.site.check_inputs:
        _check_reference(config.reference, config.model, model.spec, view)
    return model


def _check_reference(name: str, policy: str, spec: ModelSpec, view: View) -> None:
    if _visible(name, view):
        place = _place_of(name, view) or name
        check_same_shape(name, load_model_config(place, _cache(view)).spec, policy, spec)
        _look_into(place, spec, view)


def _place_of(name: str, view: View) -> str | None:
    """The folder here of a model that a container sees elsewhere; None: it is called by its name here too."""
    if view.site.image is None or is_shipped(name) or name.startswith("~"):  # no shell is between RUN.yaml and training
        return None
    place = view.here(name)
    return str(place) if place is not None and (Path(name).is_absolute() or place.is_dir()) else None


def _visible(name: str, view: View) -> bool:
    """Whether the weights lie where this machine can look: in a folder, or in a cache."""
    if Path(name).is_absolute():
        return view.here(name) is not None
    cache = hub_cache(view.site.env)
    return cache is None or view.here(cache) is not None or Path(_place_of(name, view) or name).is_dir()


def _cache(view: View) -> Path | None:
    cache = hub_cache(view.site.env)
    return None if cache is None else view.here(cache) or cache


def _look_into(name: str, spec: ModelSpec, view: View) -> None:
    HfIndex(find_weights(name, _cache(view))).check(hf_shapes(spec))


def hub_cache(variables: Mapping[str, str]) -> Path | None:
    """Hugging Face's cache under variables that a site sets; None: it sets none of those, and the cache is ours."""
    if not any(name in variables for name in _OF_THE_CACHE):
        return None
    known = {**os.environ, **variables}
    home = known.get("HF_HOME") or str(Path(known.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = known.get("HF_HUB_CACHE") or known.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def check_inputs(config: RunConfig, view: View) -> None:
    """UsageError for what `train` would refuse before it loads a model, of what takes no model and no tokenizer."""
    if not view.site.check_inputs:
        return
    if (path := _check_files("data.train", config.data.train, config.data.split, view)) is not None:
        _check_rows(str(path), config)
    for name in config.evaluation.benchmarks:
        if name.endswith(FILE_KINDS):
            _check_files("evaluation.benchmarks", name, "train", view)
        else:
            _check_benchmarks(name, config.evaluation.data, view)
    _check_functions(config, view.site)


def _check_files(key: str, source: str, split: str, view: View) -> Path | None:
    """Where they are here, if that is known."""
    path = view.here(source)
    if path is None or is_hub_id(source):  # the job fetches what is on the hub
        return None
    try:
        find_files(str(path), split)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
    return path


def _check_rows(path: str, config: RunConfig) -> None:
    data = config.data
    changed = max(file.stat().st_mtime_ns for file in find_files(path, data.split))
    rows = _rows(path, data.split, data.prompt_key, data.answer_key, changed)
    if len(rows) < data.prompts_per_step:
        raise UsageError(
            f"{path}: data.prompts_per_step is {data.prompts_per_step}, and there are {len(rows)} rows: lower it"
        )
    judged = (path, data.split, data.prompt_key, data.answer_key, changed, repr(config.rewards))
    if judged not in _judged:  # the runs of a study have all the same
        check_answers(rows, config.rewards, path)
        _judged.add(judged)


_judged: set[tuple[object, ...]] = set()


@functools.lru_cache(maxsize=2)
def _rows(path: str, split: str, prompt_key: str, answer_key: str, changed: int) -> list[Row]:
    return read_rows(path, split, prompt_key, answer_key)


def _check_benchmarks(names: str, data: str | None, view: View) -> None:
    try:
        benchmarks = select_benchmarks(names)
        folder = None if data is None else view.here(data)
        if folder is not None:
            for benchmark in benchmarks:
                load_benchmark(benchmark, folder)
    except UsageError as error:
        raise UsageError(f"evaluation.benchmarks: {error}") from None


def _check_functions(config: RunConfig, site: SiteConfig) -> None:
    """By the interpreter that will run them, if it is here."""
    python = sys.executable if site.venv is None else f"{site.venv.rstrip('/')}/bin/python"
    if site.image is None and Path(python).exists():
        check_functions(config.rewards, python, {**site.env, "CUDA_VISIBLE_DEVICES": ""})
