"""`lens-megatron status`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "what a run is doing: its job, its last step, its log's last error"
EXAMPLE = "lens-megatron status runs/lens-8b"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--json", type=Path, metavar="F")


def run(args: argparse.Namespace) -> int:
    from launchers.run_status import describe, look
    from lens_megatron.output import write_json

    status = look(args.run)
    for name, text in describe(status):
        print(f"{name:<11} {text}")
    if args.json is not None:
        write_json(args.json, status)
    return 0
