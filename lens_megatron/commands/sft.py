"""`lens-megatron sft`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.config import SftConfig

SUMMARY = "supervised training on rows of prompt and response"
EXAMPLE = "lens-megatron sft SFT.yaml optimizer.lr=1e-5 parallel.tp=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="SFT.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings
    from lens_megatron.commands._workers import in_layout
    from lens_megatron.config import load_sft
    from lens_megatron.data.files import check_source
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.run_folder import RunFolder

    endings.on_signals(endings.AFRESH)
    config = load_sft(Path(args.run), args.overrides)

    def look() -> None:
        RunFolder(config.run_dir).check_is_new()
        check_source(config.data.train, config.data.split)

    return in_layout(
        ["sft", args.run, *args.overrides],
        config.parallel,
        load_model_spec(config.model),
        lambda: _sft(config),
        model=config.model,
        look=look,
    )


def _sft(config: SftConfig) -> int:
    from lens_megatron import endings, workers
    from lens_megatron.mcore import runtime
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.sft import train_supervised

    folder = RunFolder.create(config.run_dir) if workers.rank() == 0 else None
    try:
        with endings.noted(folder):
            target = train_supervised(config, folder)
        if folder is not None:
            folder.write_ending("done")
    finally:
        if folder is not None:
            folder.close()
        runtime.shutdown()
    if workers.rank() == 0:
        print(f"weights in {target}")
    return 0
