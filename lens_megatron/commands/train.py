"""`lens-megatron train`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "train with LENS or a rival; starts local workers itself, or joins torchrun/srun"
EXAMPLE = "lens-megatron train RUN.yaml algorithm=lens steps=100 parallel.tp=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint of run_dir")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import loop, strict, workers
    from lens_megatron.config import RunConfig, load_run
    from lens_megatron.mcore.layout import check_layout
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.trainer import Trainer

    config = load_run(Path(args.run), args.overrides)
    model = load_model_config(config.model)
    if not workers.is_worker():
        check_layout(model.spec, config.parallel, config.parallel.processes)
        if config.parallel.processes > 1:
            resume = ["--resume"] if args.resume else []
            return workers.run_workers(config.parallel.processes, ["train", *resume, args.run, *args.overrides])
    folder = None
    if workers.rank() == 0:
        folder = RunFolder.resume(config.run_dir) if args.resume else RunFolder.create(config.run_dir)
    if folder is not None:
        folder.write_config(strict.to_tree(RunConfig, config))
        folder.write_versions()
    trainer = Trainer(config, model, folder)
    try:
        if args.resume:
            trainer.resume()
        loop.train(config, trainer)
    finally:
        trainer.close()
    return 0
