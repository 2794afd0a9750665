"""`lens-megatron models`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "the shipped models, with parameter counts and shapes"
EXAMPLE = "lens-megatron models --json models.json"

_LEAST, _WHOLE = 98, 136  # columns of the terminal: below the second what matters least is left out
_LEFT_OUT = ("heads/kv", "tied", "experts")
_TO_THE_LEFT = ("name", "family", "tied", "experts", "hub id")


def _cells(row: dict[str, Any], wide: bool) -> dict[str, str]:
    """By the column's title."""
    count = "{:,}".format if wide else _short
    cells = {
        "name": row["name"],
        "family": row["family"],
        "parameters": count(row["parameters"]),
        "active": count(row["active_parameters"]) if row["experts"] else "",
        "layers": str(row["layers"]),
        "hidden": str(row["hidden_size"]),
        "heads/kv": f"{row['heads']}/{row['kv_heads']}",
        "tied": "yes" if row["tied"] else "no",
        "experts": f"{row['experts']}, top {row['experts_per_token']}" if row["experts"] else "",
        "hub id": row["hub_id"] or "-",
    }
    return cells if wide else {title: text for title, text in cells.items() if title not in _LEFT_OUT}


def _short(count: int) -> str:
    unit, name = next((1000**power, name) for power, name in ((3, "B"), (2, "M"), (1, "K")) if count >= 1000**power)
    return f"{count / unit:.3g}{name}"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="F", help="write the table to F as well, with advised layouts")


def run(args: argparse.Namespace) -> int:
    from rich.table import Table

    from lens_megatron.model_spec import load_model_config, shipped_models
    from lens_megatron.output import wide_console, write_json
    from lens_megatron.planning.catalog import describe

    rows = [describe(load_model_config(name)) for name in shipped_models()]
    rows.sort(key=lambda row: row["parameters"])
    console = wide_console(_LEAST)
    cells = [_cells(row, wide=console.width >= _WHOLE) for row in rows]
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in cells[0]:
        table.add_column(title, justify="left" if title in _TO_THE_LEFT else "right", no_wrap=True)
    for texts in cells:
        table.add_row(*texts.values())
    console.print(table)
    if args.json:
        write_json(args.json, {"models": rows})
    return 0
