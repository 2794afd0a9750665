"""`lens-megatron score`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_megatron.scoring import ScoreConfig, ScoredPrompt, ScoreResult

SUMMARY = "interference scores |log pi_theta - log pi_ref| of prompt tokens, and what purification would delete"
EXAMPLE = (
    'lens-megatron score --model runs/lens/hf/step_000300 --reference qwen3-8b-base --prompt "Solve x^2 = 4." '
    "--gamma 0.03 parallel.tp=2"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="the policy: an HF folder (a run's: hf/step_N), a shipped name or a cached hub id",
    )
    parser.add_argument("--reference", required=True, help="the reference, of the same shape")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--prompts", metavar="F.jsonl", help='a file with {"prompt": ...} a line')
    parser.add_argument("--gamma", type=float, help="share of the eligible tokens to delete (default 0.03)")
    parser.add_argument("--scope", choices=("question", "prompt"), help="which tokens are eligible (default question)")
    parser.add_argument("--json", metavar="F", help="write the scores as JSON")
    parser.add_argument("--html", metavar="F", help="write the prompts as a heat map")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. parallel.tp=2 purification.ties=position"
    )


def run(args: argparse.Namespace) -> int:
    from lens_megatron import endings, strict
    from lens_megatron.commands._workers import in_layout
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.output import check_writable
    from lens_megatron.scoring import ScoreConfig, check_models

    endings.on_signals(endings.AFRESH)
    tree = strict.apply_overrides({}, args.overrides)
    for key, value in (("gamma", args.gamma), ("scope", args.scope)):
        if value is not None:
            tree.setdefault("purification", {})[key] = value
    config = strict.build(ScoreConfig, tree, "score")
    check_writable(args.json, args.html)
    check_models(args.model, args.reference)
    return in_layout(
        ["score", *_arguments(args)], config.parallel, load_model_spec(args.model), lambda: _score(args, config)
    )


def _score(args: argparse.Namespace, config: ScoreConfig) -> int:
    from lens_megatron import workers
    from lens_megatron.scoring import prompts_from, score_prompts

    prompts = prompts_from(args.model, args.prompt, args.prompts, config.template)
    result = score_prompts(args.model, args.reference, prompts, config)
    if workers.rank() == 0:
        _show(result, args)
    return 0


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line again, for the workers."""
    options = ("model", "reference", "prompt", "prompts", "gamma", "scope", "json", "html")
    given = [(f"--{name}", getattr(args, name)) for name in options if getattr(args, name) is not None]
    return [*(f"{flag}={value}" for flag, value in given), *args.overrides]


def _show(result: ScoreResult, args: argparse.Namespace) -> None:
    from rich.console import Console

    from lens_megatron.output import write_json, write_page
    from lens_megatron.reporting.heatmap import heatmap_page, terminal_heatmap

    console = Console(highlight=False)
    for prompt in result.prompts:
        console.print(_table(prompt))
        console.print(terminal_heatmap(prompt.tokens, prompt.scores, prompt.deleted))
        if not prompt.deleted:
            console.print("nothing deleted: no eligible score is above the noise floor")
    console.print(f"noise floor {result.noise_floor:.3g} (scores at or below it are ties)")
    if args.json:
        tree = {
            "prompts": [dataclasses.asdict(prompt) for prompt in result.prompts],
            "noise_floor": result.noise_floor,
        }
        write_json(Path(args.json), tree)
    if args.html:
        caption = f"|log pi - log ref| under {args.model} and {args.reference}; deleted tokens are struck out"
        pages = [(prompt.tokens, prompt.scores, prompt.deleted) for prompt in result.prompts]
        write_page(Path(args.html), heatmap_page(pages, caption))


def _table(prompt: ScoredPrompt) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading in ("position", "id", "log pi", "log ref", "|difference|"):
        table.add_column(heading, justify="right")
    table.add_column("token")
    table.add_column("")
    rows = zip(
        prompt.ids,
        prompt.policy_logprobs,
        prompt.reference_logprobs,
        prompt.scores,
        prompt.tokens,
        prompt.eligible,
        strict=True,
    )
    for position, (token_id, policy, reference, score, token, eligible) in enumerate(rows):
        note = "deleted" if position in prompt.deleted else "" if eligible else "not eligible"
        numbers = ["" if value is None else f"{value:.4f}" for value in (policy, reference)]
        shown = "" if score is None else f"{score:.2e}"
        table.add_row(str(position), str(token_id), *numbers, shown, escape(repr(token)[1:-1]), note)
    return table
