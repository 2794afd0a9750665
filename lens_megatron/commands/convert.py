"""`lens-megatron convert`: checkpoint tools, sub-command by sub-command."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

SUMMARY = "HF <-> Megatron checkpoints: convert, verify, inspect, average, prune"
EXAMPLE = "lens-megatron convert hf-to-megatron Qwen3-8B-Base checkpoints/base"

_DTYPES = ("bfloat16", "float16", "float32")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, help: str, example: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n  lens-megatron convert {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    for name, help, example in (
        ("hf-to-megatron", "HF folder -> Megatron checkpoint that every layout loads", "Qwen3-8B-Base base"),
        ("megatron-to-hf", "checkpoint of any layout -> HF folder", "runs/lens-8b/checkpoints/step_000300 lens-8b"),
    ):
        convert = action(name, help, example)
        convert.add_argument("source", type=Path, metavar="SRC")
        convert.add_argument("target", type=Path, metavar="DST")
        convert.add_argument("--dtype", choices=_DTYPES, help="default: what each tensor has")
        _workers(convert)
    verify = action("verify", "compare two checkpoints of either format; exit code 1 if they differ", "Qwen3-8B base")
    verify.add_argument("a", type=Path, metavar="A")
    verify.add_argument("b", type=Path, metavar="B")
    verify.add_argument("--text", metavar="TEXT", help="the probe; default: a built-in one")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="allowed relative difference of hidden states and logits",
    )
    verify.add_argument("--no-logits", action="store_true", help="names, shapes and bits only")
    verify.add_argument("--json", type=Path, metavar="F", help="write the result to F as well")
    inspect = action("inspect", "what is in a checkpoint", "runs/lens-8b/checkpoints/step_000300")
    inspect.add_argument("checkpoint", type=Path, metavar="A")
    inspect.add_argument("--json", type=Path, metavar="F", help="write it to F as well, with every tensor")
    average = action("average", "the mean of several checkpoints' weights", "step_000280 step_000300 averaged")
    average.add_argument("sources", type=Path, nargs="+", metavar="A", help="two or more checkpoints")
    average.add_argument("target", type=Path, metavar="DST")
    average.add_argument("--weights", metavar="W,W,...", help="one a checkpoint, scaled to sum 1; default: equal")
    _workers(average)
    prune = action("prune-optimizer", "drop the optimizer from a checkpoint, in place", "step_000300")
    prune.add_argument("checkpoint", type=Path, metavar="A")
    _workers(prune)


def _workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads; default: up to 4")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {text})")
    return value


def run(args: argparse.Namespace) -> int:
    if args.action == "inspect":
        return _inspect(args)
    if args.action == "verify":
        return _verify(args)
    start = time.monotonic()
    target = _write(args)
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    much = f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
    print(f"{target}: {much} in {seconds:.1f} s ({size / 2**20 / seconds:,.0f} MiB/s)")
    return 0


def _write(args: argparse.Namespace) -> Path:
    """Run the action; where its result is. torch, whose import takes longer than copying a small model, is left out where
    nothing is computed."""
    from checkpoints_tools.streaming import default_workers

    workers = args.workers or default_workers()
    if args.action in ("hf-to-megatron", "megatron-to-hf"):
        from checkpoints_tools.hf_to_megatron import hf_to_megatron
        from checkpoints_tools.megatron_to_hf import megatron_to_hf
        from lens_megatron.mcore.stored_dtypes import BY_NAME

        convert = hf_to_megatron if args.action == "hf-to-megatron" else megatron_to_hf
        convert(args.source, args.target, BY_NAME[args.dtype] if args.dtype else None, workers)
        return Path(args.target)
    from checkpoints_tools import combine

    if args.action == "average":
        combine.average(args.sources, args.target, combine.parse_weights(args.weights, len(args.sources)), workers)
        return Path(args.target)
    return combine.prune_optimizer(args.checkpoint, workers)


def _inspect(args: argparse.Namespace) -> int:
    from checkpoints_tools.inspection import inspect_checkpoint, summary
    from lens_megatron.output import write_json

    found = inspect_checkpoint(args.checkpoint)
    rows = summary(found)
    longest = max(len(name) for name, _ in rows)
    for name, value in rows:  # no table: paths are longer than its columns
        print(f"{name:<{longest}}  {value}")
    if args.json:
        write_json(args.json, found)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from checkpoints_tools.verify import describe, verify
    from lens_megatron.output import check_writable, write_json

    check_writable(args.json)
    result = verify(args.a, args.b, args.text, args.tolerance, logits=not args.no_logits)
    for line in describe(result):
        print(line)
    if args.json:
        write_json(args.json, result)
    return 0 if result["equal"] else 1
