"""`lens-megatron quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "toy base model, GRPO and LENS on a laptop, and a report to look at"
EXAMPLE = "lens-megatron quickstart --dir runs/quickstart --steps 50"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", default="runs/quickstart", help="where everything goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of each algorithm (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from lens_megatron import endings
    from lens_megatron.errors import UsageError
    from lens_megatron.quickstart import quickstart

    if args.steps < 1:
        raise UsageError(f"--steps is at least 1 (got {args.steps})")
    endings.on_signals()
    folder = Path(args.dir)
    outcomes = quickstart(folder, args.steps)
    table = Table(title="rollouts that succeed, prompts without success: first and last fifth")
    headings = ("", "success\nfirst", "success\nlast", "no success\nfirst", "no success\nlast", "held-out\nbase")
    for heading in (*headings, "held-out\ntrained"):
        table.add_column(heading)
    for o in outcomes:
        numbers = (o.first, o.last, o.zero_reward_first, o.zero_reward_last, o.held_out_base, o.held_out)
        table.add_row(o.name, *(f"{number:.3f}" for number in numbers))
    Console().print(table)
    print(f"report: {(folder / 'report.html').resolve()}")
    return 0
