"""`lens-megatron eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lens_megatron.errors import UsageError

if TYPE_CHECKING:
    from lens_megatron.evaluation.results import ModelResult

SUMMARY = "the seven benchmarks of the paper's Table 1, for a model, a checkpoint, or every saved step of a run"
EXAMPLE = "lens-megatron eval runs/lens-8b --benchmarks all --data benchmarks/data --json lens-8b.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="an HF folder, a shipped name or cached hub id, a checkpoint, or a run folder"
    )
    parser.add_argument(
        "--benchmarks", required=True, metavar="all|a,b", help="names, and .jsonl or .parquet files of data rows"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the benchmarks' NAME.jsonl (default: the hub)")
    parser.add_argument("--samples", type=int, metavar="N", help="k of every benchmark (default: the paper's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each, for a trial")
    parser.add_argument(
        "--engine", metavar="E", help="embedded (default), sglang, or http://HOST:PORT of a running one"
    )
    parser.add_argument("--out", metavar="DIR", help="answers, tables, pages (default: evaluations/MODEL)")
    parser.add_argument("--json", metavar="F", help="write the results to F as well")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. temperature=0.6 max_response_tokens=8192"
    )


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, strict
    from lens_megatron.evaluation.config import EvalConfig
    from lens_megatron.evaluation.evaluate import evaluate, settings
    from lens_megatron.evaluation.models import find_models, run_rewards
    from lens_megatron.evaluation.results import results_tree
    from lens_megatron.output import check_writable, write_json

    endings.on_signals()
    tree = strict.apply_overrides({}, args.overrides)
    tree["benchmarks"] = [name for name in args.benchmarks.split(",") if name.strip()]
    for key in ("data", "samples", "limit", "engine"):
        if getattr(args, key) is not None:
            tree[key] = getattr(args, key)
    if (rewards := run_rewards(args.model)) is not None:
        tree["rewards"] = strict.merge(rewards, tree.get("rewards", {}))
    config = strict.build(EvalConfig, tree, "eval")
    if not config.benchmarks:
        raise UsageError("--benchmarks: give all, or some of them")
    check_writable(args.json)
    models = find_models(args.model)
    name = models[0].name if len(models) == 1 else Path(args.model).resolve().name
    out = Path(args.out) if args.out else Path("evaluations") / name
    results = evaluate(models, config, out)
    if args.json:
        write_json(Path(args.json), results_tree(results, settings(config)))
    _show(results, out)
    return 0


def _show(results: list[ModelResult], out: Path) -> None:
    from rich.table import Table

    from lens_megatron.evaluation import tables
    from lens_megatron.output import wide_console

    style = {"best": "[bold]{}[/]", "second": "[underline]{}[/]", "": "{}"}
    table = Table(title=", ".join(f"{measure} ({count})" for measure, count in tables.measures(results)))
    table.add_column("model")
    for name in tables.columns(results):
        table.add_column(name, justify="right")
    for result, marks in zip(results, tables.marks(results), strict=True):
        table.add_row(
            result.name, *(style[mark].format(cell) for cell, mark in zip(tables.cells(result), marks, strict=True))
        )
    console = wide_console(110)
    console.print(table)
    if note := tables.partial_note(results):
        console.print(note, markup=False)
    console.print(f"answers, tables and pages: {out.resolve()}", markup=False)
