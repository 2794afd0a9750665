"""`lens-megatron check`: every guard and two steps of RUN.yaml with tiny sequences, in its layout, on its machines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.config import RunConfig
    from lens_megatron.model_spec import ModelConfig

SUMMARY = "before a long job: all guards and two tiny steps in the real layout, in a folder of their own"
EXAMPLE = "lens-megatron check RUN.yaml parallel.tp=2"

_PROMPTS, _RESPONSE_TOKENS = 4, 16


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, stopping

    stopping.hold_signal()
    from lens_megatron.commands._workers import in_layout
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config

    endings.on_signals(endings.AFRESH)
    config = tiny(load_run(Path(args.run), args.overrides))
    model = load_model_config(config.model)
    return in_layout(
        ["check", args.run, *args.overrides],
        config.parallel,
        model.spec,
        lambda: _check(config, model),
        model=config.model,
        run=config,
    )


def tiny(config: RunConfig) -> RunConfig:
    """Two steps of it, with a checkpoint after each and every guard at each; the layout and the engine stay."""
    from dataclasses import replace

    from lens_megatron.algorithms.filters import FilterConfig

    return replace(
        config,
        run_dir=config.run_dir.rstrip("/") + ".check",
        name=f"check of {config.name}",
        steps=2,
        data=replace(config.data, prompts_per_step=min(_PROMPTS, config.data.prompts_per_step)),
        rollout=replace(config.rollout, max_response_tokens=min(_RESPONSE_TOKENS, config.rollout.max_response_tokens)),
        # answers cut short are all wrong: a filter that asks for groups of both kinds would ask for ever
        algorithm=replace(
            config.algorithm,
            filter=FilterConfig(),
            advantage=replace(config.algorithm.advantage, overlong=None),
        ),
        checkpoint=replace(config.checkpoint, every=1, keep=1, keep_best=None, hf_every=0),
        evaluation=replace(config.evaluation, benchmarks=[]),
        diagnostics=replace(config.diagnostics, every=0),
        tracking=replace(config.tracking, tensorboard=False, wandb_project=None),
        guards=replace(config.guards, replicas_every=min(1, config.guards.replicas_every)),
    )


def _check(config: RunConfig, model: ModelConfig) -> int:
    import shutil

    from lens_megatron import loop, workers
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.trainer import Trainer

    speaks = workers.rank() == 0
    if speaks:
        shutil.rmtree(config.run_dir, ignore_errors=True)  # of an earlier check that failed
    folder = RunFolder.create(config.run_dir) if speaks else None
    trainer = Trainer(config, model, folder)
    try:
        with trainer.watch.reporting():
            loop.train(config, trainer)
            trainer.resume()  # the checkpoint that was just written, on top of what wrote it
    finally:
        trainer.close()
    if speaks:
        shutil.rmtree(config.run_dir, ignore_errors=True)
        print(
            f"check passed: two steps, a checkpoint and its resume in the layout of {config.name.removeprefix('check of ')}"
        )
        print(f"guards that held: {', '.join(_guards_that_looked(config))}")
    return 0


def _guards_that_looked(config: RunConfig) -> list[str]:
    guards, algorithm = config.guards, config.algorithm
    looked = {
        "first_step": algorithm.needs_reference,
        "engine_weights": config.rollout.engine == "embedded",
        "entropy_masks": algorithm.loss.entropy_split is not None,
    }
    on = [name for name, value in vars(guards).items() if value is True and looked.get(name, True)]
    on += ["logprob_diff"] if config.update.old_logprobs == "megatron" and guards.on_logprob_diff != "report" else []
    return on + (["replicas_every"] if guards.replicas_every else [])
