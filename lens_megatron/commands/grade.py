"""`lens-megatron grade`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "judge predictions against golden answers, as training and evaluation do"
EXAMPLE = "lens-megatron grade answers.jsonl --json graded.json default.kind=math"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help='one {"gold": ..., "prediction": ...} a line; "source" picks a rule')
    parser.add_argument(
        "--json", type=Path, metavar="F", help="write the rows to F (.jsonl: a line each), not to stdout"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="k=v", help="of the rewards section: workers=8, default.kind=numeric"
    )


def run(args: argparse.Namespace) -> int:
    import json
    import sys

    from lens_megatron import strict
    from lens_megatron.output import check_writable, write_json, write_json_lines
    from lens_megatron.rewards.config import RewardConfig
    from lens_megatron.rewards.grading import grade_rows, read_pairs, summarise

    config = strict.build(RewardConfig, strict.apply_overrides({}, args.settings), "grade")
    check_writable(args.json)
    rows = grade_rows(read_pairs(args.file), config)
    summary = summarise(rows)
    if args.json is None:
        for row in rows:
            print(json.dumps(row))
    elif args.json.suffix == ".jsonl":
        write_json_lines(args.json, rows)
    else:
        write_json(args.json, {**summary, "rows": rows})
    counts = ", ".join(f"{count} {verdict}" for verdict, count in summary["verdicts"].items())
    print(f"{summary['count']} judged: {counts}; mean reward {summary['reward']:.4f}", file=sys.stderr)
    return 0
