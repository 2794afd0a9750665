"""`lens-megatron analyze`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lens_megatron.evaluation.interference import Interference, InterferenceConfig
    from lens_megatron.types import Prompt

SUMMARY = "interference tokens of any two models: the paper's Figures 2b and 2c"
EXAMPLE = (
    "lens-megatron analyze interference runs/lens/hf/step_000300 --reference qwen3-8b-base --data failed.jsonl"
    " --html page.html"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("interference",))
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the policy: an HF folder (a run's: hf/step_N), a shipped name or a cached hub id",
    )
    parser.add_argument("--reference", required=True, metavar="R", help="the reference, of the same shape")
    parser.add_argument("--data", required=True, metavar="D", help="rows with prompt and answer")
    parser.add_argument("--out", metavar="DIR", help="answers and the page (default: analyses/MODEL)")
    parser.add_argument("--json", metavar="F", help="write the results to F")
    parser.add_argument("--html", metavar="F", help="write the page to F instead of into DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. gammas='[0.02]' samples=4 limit=200")


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, strict
    from lens_megatron.commands._workers import in_layout
    from lens_megatron.evaluation.interference import InterferenceConfig, load_analysis_prompts
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.output import check_writable
    from lens_megatron.scoring import check_models

    endings.on_signals()
    config = strict.build(InterferenceConfig, strict.apply_overrides({}, args.overrides), "analyze")
    check_writable(args.json, args.html)
    check_models(args.model, args.reference)
    prompts = load_analysis_prompts(args.model, args.data, config)
    return in_layout(
        ["analyze", *_arguments(args)],
        config.parallel,
        load_model_spec(args.model),
        lambda: _analyze(args, config, prompts),
    )


def _analyze(args: argparse.Namespace, config: InterferenceConfig, prompts: Sequence[Prompt]) -> int:
    from lens_megatron import workers
    from lens_megatron.evaluation.interference import measure, score_all, tree_of
    from lens_megatron.evaluation.interference_page import interference_page
    from lens_megatron.model_spec import find_weights
    from lens_megatron.output import write_json, write_page

    scored = score_all(args.model, args.reference, prompts, config)
    if workers.rank() > 0:
        return 0
    out = Path(args.out) if args.out else Path("analyses") / "_".join(find_weights(args.model).resolve().parts[-2:])
    found = measure(args.model, prompts, scored, config, out)
    page = Path(args.html) if args.html else out / "interference.html"
    write_page(page, interference_page(found, args.model, args.reference, config))
    if args.json:
        write_json(Path(args.json), tree_of(found))
    _show(found, page)
    return 0


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line again, for the workers."""
    options = ("reference", "data", "out", "json", "html")
    given = [f"--{name}={getattr(args, name)}" for name in options if getattr(args, name) is not None]
    return [args.what, args.model, *given, *args.overrides]


def _show(found: Interference, page: Path) -> None:
    from rich.table import Table

    from lens_megatron.evaluation.interference_page import HEAD, rows
    from lens_megatron.output import wide_console

    table = Table(title=f"{found.failed} of {found.prompts} prompts failed; percent of responses correct")
    for heading in HEAD:
        table.add_column(heading, justify="right")
    for row in rows(found):
        table.add_row(*row)
    console = wide_console(120)
    console.print(table)
    console.print(f"page: {page.resolve()}", markup=False)
