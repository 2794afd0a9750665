"""`lens-megatron sft`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "supervised training on rows of prompt and response"
EXAMPLE = "lens-megatron sft SFT.yaml optimizer.lr=1e-5 parallel.tp=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="SFT.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, kernel_order, workers
    from lens_megatron.config import load_sft
    from lens_megatron.mcore import runtime
    from lens_megatron.mcore.hf_files import check_folder
    from lens_megatron.mcore.layout import check_layout
    from lens_megatron.model_spec import find_weights, load_model_spec
    from lens_megatron.run_folder import RunFolder
    from lens_megatron.sft import train_supervised

    endings.on_signals(endings.AFRESH)
    config = load_sft(Path(args.run), args.overrides)
    kernel_order.prepare(config.parallel)
    if not workers.is_worker():
        spec = load_model_spec(config.model)
        check_layout(spec, config.parallel, config.parallel.processes)
        check_folder(find_weights(config.model), spec)
        if config.parallel.processes > 1:
            return workers.run_workers(config.parallel.processes, ["sft", args.run, *args.overrides])
    with endings.lost_peers():
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
