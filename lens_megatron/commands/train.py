"""`lens-megatron train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig
    from lens_megatron.model_spec import ModelConfig

SUMMARY = "train with LENS or a rival; starts local workers itself, or joins torchrun/srun"
EXAMPLE = "lens-megatron train RUN.yaml algorithm=lens steps=100 parallel.tp=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint of run_dir")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, workers
    from lens_megatron.config import load_run
    from lens_megatron.mcore.hf_files import check_folder
    from lens_megatron.mcore.layout import check_layout
    from lens_megatron.model_spec import find_weights, load_model_config

    endings.on_signals()
    config = load_run(Path(args.run), args.overrides)
    model = load_model_config(config.model)
    if not workers.is_worker():
        check_layout(model.spec, config.parallel, config.parallel.processes)
        check_folder(find_weights(config.model), model.spec)
        if config.parallel.processes > 1:
            resume = ["--resume"] if args.resume else []
            return workers.run_workers(config.parallel.processes, ["train", *resume, args.run, *args.overrides])
    with endings.lost_peers():
        _train(config, model, args.resume)
    return 0


def _train(config: RunConfig, model: ModelConfig, resume: bool) -> None:
    from lens_megatron import loop, strict, workers
    from lens_megatron.config import RunConfig
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.trainer import Trainer

    folder = None
    if workers.rank() == 0:
        folder = RunFolder.resume(config.run_dir) if resume else RunFolder.create(config.run_dir)
    trainer = Trainer(config, model, folder)
    try:
        if folder is not None:  # only now: a start that failed for bad input leaves no run to be resumed
            folder.write_config(strict.to_tree(RunConfig, config))
            folder.write_versions()
        if resume:
            trainer.resume()
        loop.train(config, trainer)
    finally:
        trainer.close()
