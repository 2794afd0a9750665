"""`lens-megatron study`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "a grid of runs: here, on Slurm or simulated; resumable; tables and one page"
EXAMPLE = "lens-megatron study examples/scaling/STUDY.yaml at_once=2"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of STUDY.yaml")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", help="run only cells of such names ('grpo-*'); may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="show the cells and what is done; run nothing")
    parser.add_argument("--collect", action="store_true", help="tables and page of what there is; run nothing")
    parser.add_argument("--json", type=Path, metavar="F", help="write a row per cell to F as well")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings
    from lens_megatron.output import check_writable, write_json, write_page
    from lens_megatron.studies.config import load_study
    from lens_megatron.studies.page import study_page
    from lens_megatron.studies.running import clean_environment, run_study, summary
    from lens_megatron.studies.states import read_state
    from lens_megatron.studies.table import cell_row, collect, write_tables

    clean_environment()
    endings.on_signals()
    study = load_study(Path(args.study), args.overrides)
    if args.list:
        for cell in study.cells:
            print(f"{read_state(study, cell).state:<10} {cell.name}  {' '.join(cell.overrides)}")
        return 0
    if args.json is not None and args.json.resolve().parent != study.folder.resolve():  # which may have to be made yet
        check_writable(args.json)
    if not args.collect:
        terminal = sys.stdout  # nemo-run's words are caught, on one thread, while another has something to say
        run_study(study, lambda line: print(line, file=terminal, flush=True), args.only or ["*"])
    results = collect(study)
    write_tables(study, results)
    page = study.folder / "study.html"
    write_page(page, study_page(study, results))
    if args.json:
        write_json(args.json, {"cells": [cell_row(study, result) for result in results]})
    print(page)
    failed = summary(study)
    for line in failed:
        print(f"failed cell {line}")
    return 1 if failed else 0
