"""`lens-megatron train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig
    from lens_megatron.model_spec import ModelConfig

_PATIENCE_S = 120.0  # of a job that is queued again, for its earlier life to end

SUMMARY = "train with LENS or a rival; starts local workers itself, or joins torchrun/srun"
EXAMPLE = "lens-megatron train RUN.yaml algorithm=lens steps=100 parallel.tp=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint of run_dir")
    how.add_argument(
        "--continue",
        action="store_true",
        dest="go_on",
        help="resume if run_dir holds a run, else start: for queued jobs",
    )


def run(args: argparse.Namespace) -> int:
    from lens_megatron import stopping

    stopping.hold_signal()
    from lens_megatron import endings
    from lens_megatron.commands._workers import in_layout
    from lens_megatron.config import load_run, preset_line
    from lens_megatron.data.files import check_source
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.run_folder import RunFolder

    endings.on_signals(endings.RESUME)
    config = load_run(Path(args.run), args.overrides)
    endings.resumes_in(config.run_dir)
    model = load_model_config(config.model)

    def look() -> None:
        folder = RunFolder(config.run_dir)
        if args.resume:
            folder.check_is_run()
        elif not args.go_on:
            folder.check_is_new()
        check_source(config.data.train, config.data.split)

    how = ["--resume"] if args.resume else ["--continue"] if args.go_on else []
    return in_layout(
        ["train", *how, args.run, *args.overrides],
        config.parallel,
        model.spec,
        lambda: _train(config, model, args.resume, args.go_on, preset_line(Path(args.run), args.overrides)),
        model=config.model,
        run=config,
        noted_in=config.run_dir,
        look=look,
    )


def _train(config: RunConfig, model: ModelConfig, resume: bool, go_on: bool, from_preset: str = "") -> int:
    """`from_preset`: told of a new run, whose RUN.yaml does not show it."""
    from lens_megatron import endings, loop, resuming, stopping, strict, workers
    from lens_megatron.config import RunConfig
    from lens_megatron.progress import closing_line
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.trainer import Trainer

    folder, tree = None, strict.to_tree(RunConfig, config)
    if workers.rank() == 0:
        if resume or (go_on and RunFolder(config.run_dir).holds_run()):
            folder = RunFolder.resume(config.run_dir, _PATIENCE_S if go_on else 0.0)
            for line in resuming.changes(folder, tree):
                print(line, file=sys.stderr)
            from_preset = ""
        else:
            folder = RunFolder.create(config.run_dir)
        if not go_on:
            stopping.forget_stop(folder.path)
    trainer = Trainer(config, model, folder)
    try:
        with trainer.watch.reporting():
            if resume or go_on:
                trainer.resume()
            if trainer.nothing_left:  # no step is made of what is asked for now: the files stay those of the steps made
                if folder is not None and trainer.first_step >= folder.read_config().get("steps", 0):
                    folder.write_ending("done")  # its own end; it may have been killed before it could say so
                return 0
            # only now: a start that failed for bad input leaves no run, a refused resume leaves the one that is there
            if folder is not None:
                folder.begin(tree, trainer.first_step)
                if from_preset:
                    print(from_preset, file=sys.stderr)
            with trainer.rescuing(), endings.noted(folder):
                order = loop.train(config, trainer)
            if folder is not None:
                folder.write_ending("done" if order is None else "stopped" if order == "stop" else "unfinished")
    finally:
        trainer.close()
    if order is None:
        if folder is not None:
            print(closing_line(config.run_dir, folder.read_metrics()), file=sys.stderr)
        return 0
    if folder is not None:
        print(f"told to {order}: ended with a whole checkpoint; --resume goes on from it", file=sys.stderr)
    return stopping.EXIT_CODES[order]
