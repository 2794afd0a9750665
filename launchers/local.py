"""Runs on this machine, through nemo-run: the same call as on Slurm, for trying a RUN.yaml before queueing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launchers import nemo
from launchers.site import split_overrides
from lens_megatron.config import load_run
from lens_megatron.errors import RunError
from lens_megatron.mcore.layout import check_layout
from lens_megatron.model_spec import find_weights, load_model_config
from lens_megatron.run_folder import RunFolder


def command(run: Path, overrides: Sequence[str], resume: bool = False) -> list[str]:
    """Arguments of `lens-megatron`. Overrides of a site mean nothing here."""
    of_run, _ = split_overrides(overrides)
    config = load_run(run, of_run)
    check_layout(load_model_config(config.model).spec, config.parallel, config.parallel.processes)
    find_weights(config.model)
    return ["train", *(["--resume"] if resume else []), str(run), *of_run]


def launch(run: Path, overrides: Sequence[str], name: str = "", *, resume: bool = False) -> RunFolder:
    """Trains, and returns when it has ended. RunError when it failed."""
    arguments = command(run, overrides, resume)
    of_run, _ = split_overrides(overrides)
    folder = RunFolder(load_run(run, of_run).run_dir)
    if not nemo.run_locally(arguments, name or folder.path.name):
        raise RunError(f"the run in {folder.path} failed: see above")
    return folder
