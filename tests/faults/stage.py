"""Runs with a fault, in the processes of a pool: the loop, trainer, guards and engine of production, without starting a
process for the engine. What a run prints of itself, or dies of, comes back."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lens_megatron.errors import RunError, UsageError
from tests.loop.runs import metrics


class DriverHere:
    """RolloutDriver's verbs in this process."""

    def __init__(self, make_sampler: Any, threads: int = 1, **_: Any) -> None:
        self.sampler = make_sampler()

    def started(self) -> None: ...

    def _call(self, command: str, *args: Any) -> Any:
        from lens_megatron.rollout.driver_process import execute

        return execute(self.sampler, None, command, args)

    def load_weights(self, buckets: Iterable[Mapping[str, Any]], version: int) -> None:
        engine = self.sampler.engine
        engine.begin_update(version)
        for bucket in buckets:
            engine.update(bucket)
        engine.end_update()

    def __getattr__(self, command: str) -> Any:
        if command.startswith("_"):
            raise AttributeError(command)
        return lambda *args: self._call(command, *args)

    def close(self) -> None:
        self.sampler.close()


def run(plant: str, tree: Mapping[str, Any], resume: bool = False) -> dict[str, Any]:
    """Error kind and message ("" when none), and how many steps were finished and synced when it came."""
    import sys

    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent / "loop")]  # reward workers look for functions there too
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config
    from tests.faults.plants import PLANTS

    run_dir = Path(tree["run_dir"])
    path = run_dir.with_suffix(f".{os.environ['RANK']}.yaml")
    path.write_text(json.dumps(tree))
    config = load_run(path, [])
    model = load_model_config(config.model)
    began = time.monotonic()
    kind, message = "", ""
    with (
        PLANTS[plant](),
        patch("lens_megatron.host.RolloutDriver", DriverHere),
        patch("lens_megatron.mcore.runtime.shutdown", _keep_groups),
    ):
        from lens_megatron.commands.train import _train

        try:
            _train(config, model, resume, False)
        except (RunError, UsageError) as error:
            kind, message = type(error).__name__, str(error)
    lines = metrics(run_dir)
    return {"kind": kind, "message": message, "steps": len(lines), "seconds": time.monotonic() - began, "lines": lines}


def run_sft(plant: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same of supervised training."""
    from lens_megatron import workers
    from lens_megatron.config import load_sft
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.sft import train_supervised
    from tests.faults.plants import PLANTS

    run_dir = Path(tree["run_dir"])
    path = run_dir.with_suffix(f".{os.environ['RANK']}.yaml")
    path.write_text(json.dumps(tree))
    folder, kind, message = RunFolder.create(run_dir) if workers.rank() == 0 else None, "", ""
    with PLANTS[plant]():
        try:
            train_supervised(load_sft(path, []), folder)
        except RunError as error:
            kind, message = type(error).__name__, str(error)
        finally:
            if folder is not None:
                folder.close()
            _keep_groups()
    return {"kind": kind, "message": message, "steps": len(metrics(run_dir))}


def _keep_groups() -> None:
    """The pool's process group outlives a run; Megatron's groups do not."""
    from lens_megatron.mcore import runtime

    runtime._leave_groups()
    runtime._layout = None
