"""`lens-megatron doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "what this machine has, what that enables, what to install for the rest"
EXAMPLE = "lens-megatron doctor --json doctor.json"

_MARKS = {"ok": "[green]ok[/]", "missing": "[dim]missing[/]", "wrong": "[red]wrong[/]"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path(), help="where runs will be written (default: here)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the findings to F as well")


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from rich.markup import escape
    from rich.table import Table

    from lens_megatron.doctor import can_train, diagnose
    from lens_megatron.errors import UsageError
    from lens_megatron.output import wide_console, write_json

    if not args.dir.is_dir():
        raise UsageError(f"--dir {args.dir}: no such folder")
    findings = diagnose(folder=args.dir.resolve())
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        lines = [escape(finding.found)] if finding.found else []
        if finding.status != "ok":
            lines.append(f"[dim]for: {escape(finding.enables)}[/]")
        if finding.advice:
            lines.append(f"-> {escape(finding.advice)}")
        table.add_row(_MARKS[finding.status], finding.name, "\n".join(lines))
    console = wide_console(80)
    console.print(table)
    blocking = [finding.name for finding in findings if finding.blocks]
    console.print(f"Training cannot run here: {', '.join(blocking)}" if blocking else "Training can run here.")
    if args.json:
        write_json(
            args.json,
            {"can_train": can_train(findings), "findings": [dataclasses.asdict(finding) for finding in findings]},
        )
    return 1 if blocking else 0
