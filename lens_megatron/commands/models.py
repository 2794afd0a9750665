"""`lens-megatron models`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "the shipped models, with parameter counts and shapes"
EXAMPLE = "lens-megatron models --json models.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="write the table to F as well, with advised layouts")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from lens_megatron.model_spec import load_model_config, shipped_models
    from lens_megatron.output import wide_console, write_json
    from lens_megatron.planning.catalog import describe

    rows = [describe(load_model_config(name)) for name in shipped_models()]
    rows.sort(key=lambda row: row["parameters"])
    table = Table(box=None, padding=(0, 1))
    for column in ("name", "family"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "active", "layers", "hidden", "heads/kv"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("tied", "experts", "hub id"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        active = f"{row['active_parameters']:,}" if row["experts"] else ""
        experts = f"{row['experts']}, top {row['experts_per_token']}" if row["experts"] else ""
        table.add_row(
            row["name"],
            row["family"],
            f"{row['parameters']:,}",
            active,
            str(row["layers"]),
            str(row["hidden_size"]),
            f"{row['heads']}/{row['kv_heads']}",
            "yes" if row["tied"] else "no",
            experts,
            row["hub_id"] or "-",
        )
    wide_console(150).print(table)
    if args.json:
        write_json(args.json, {"models": rows})
    return 0
