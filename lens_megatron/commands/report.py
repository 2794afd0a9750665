"""`lens-megatron report`."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "one self-contained HTML page about one run or several side by side"
EXAMPLE = "lens-megatron report runs/lens runs/grpo --out report.html"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders; the run of GRPO is compared with"
    )
    parser.add_argument("--out", type=Path, metavar="F.html", help="the page (default: report.html in the first run)")


def run(args: argparse.Namespace) -> int:
    from lens_megatron.errors import UsageError
    from lens_megatron.files import replace_text
    from lens_megatron.reporting.page import report_page
    from lens_megatron.reporting.runs import load_runs

    out: Path = args.out or args.runs[0] / "report.html"
    page = report_page(load_runs(args.runs))
    try:
        replace_text(out, page)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    print(out)
    return 0
