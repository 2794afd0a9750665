"""`lens-megatron plan`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_megatron.planning.gpus import Gpu, Rates
    from lens_megatron.planning.plans import Plan
    from lens_megatron.planning.storage import Stored
    from lens_megatron.planning.syncs import Sync

SUMMARY = "memory per GPU and time per step of a run, or the best layouts of a model, before paying"
EXAMPLE = "lens-megatron plan --model qwen3-8b-base --gpus 16 --gpu h100"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN.yaml", help="with a parallel section: that layout; else a search"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--model", metavar="NAME", help="instead of a run: the paper's LENS step with this model")
    parser.add_argument("--gpus", type=int, metavar="N")
    parser.add_argument("--gpu", metavar="KIND", help="a100, a800, b200, h100, h200, mi300x (default: h100)")
    parser.add_argument("--search", action="store_true", help="the best layouts, whatever RUN.yaml's parallel says")
    parser.add_argument("--mean-prompt", type=float, metavar="TOKENS", help="assumed (default: 160)")
    parser.add_argument(
        "--mean-response", type=float, metavar="TOKENS", help="assumed (default: a quarter of the longest)"
    )
    parser.add_argument(
        "--rescued", type=float, metavar="SHARE", help="of prompts rolled out again, assumed (default: 0.35)"
    )
    parser.add_argument("--network", type=float, metavar="GB_PER_S", help="of a GPU to other nodes")
    parser.add_argument("--disk", type=float, metavar="GB_PER_S", help="of a node to shared storage (default: 2)")
    parser.add_argument(
        "--transformer-engine", action="store_true", help="plan with its kernels instead of plain torch's"
    )
    parser.add_argument("--calibration", type=Path, metavar="F", help="measured rates, made by --calibrate")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine's device into --calibration")
    parser.add_argument("--json", type=Path, metavar="F", help="write the plans to F as well")


def run(args: argparse.Namespace) -> int:
    from lens_megatron.errors import UsageError
    from lens_megatron.output import write_json
    from lens_megatron.planning.gpus import find_gpu, rates_of
    from lens_megatron.planning.plans import as_tree

    if args.calibrate:
        return _calibrate(args.calibration or Path("calibration.json"))
    if args.run and "=" in args.run and args.model:  # with --model the first word may be an override
        args.overrides.insert(0, args.run)
        args.run = None
    if (args.run is None) == (args.model is None):
        raise UsageError("name a RUN.yaml or --model NAME, one of the two")
    if args.gpus is None or args.gpus < 1:
        raise UsageError("--gpus N is missing: how many GPUs in all, trainer and engine")
    gpu = find_gpu(args.gpu or "h100", args.network, args.disk)
    rates = rates_of(gpu, args.calibration)
    plans, stored = _of_run(args, gpu, rates) if args.run else (_of_model(args, gpu, rates), [])
    source = f"measured: {', '.join(rates.measured)}; the rest assumed" if rates.measured else "assumed, none measured"
    print(f"\n{gpu.name}: rates {source}. Computed, not measured: docs/planning.md says how.")
    if args.json:
        write_json(args.json, {"plans": [as_tree(plan) for plan in plans], "storage": [asdict(one) for one in stored]})
    return 0 if any(plan.fits for plan in plans) else 1


def _of_model(args: argparse.Namespace, gpu: Gpu, rates: Rates) -> list[Plan]:
    from lens_megatron.errors import UsageError
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.planning.work import ASSUMED_RESCUED, Workload

    if args.overrides:
        raise UsageError(f"{args.overrides[0]!r}: overrides change a RUN.yaml; with --model there is none")
    spec = load_model_config(args.model).spec
    work = Workload(
        rescued=ASSUMED_RESCUED if args.rescued is None else args.rescued,
        scores_prompts=True,
        prompt_tokens=args.mean_prompt or Workload.prompt_tokens,
        response_tokens=args.mean_response or Workload.response_tokens,
    )
    return _searched(args, spec, gpu, rates, work)


def _of_run(args: argparse.Namespace, gpu: Gpu, rates: Rates) -> tuple[list[Plan], list[Stored]]:
    from lens_megatron import strict
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.planning.describe import keys_of, plan_lines, servers_of, storage_lines
    from lens_megatron.planning.plans import make_plan
    from lens_megatron.planning.setups import setup_of_run, starts_colocated_servers, sync_of_run
    from lens_megatron.planning.storage import stored_by_run
    from lens_megatron.planning.work import workload_of_run

    path = Path(args.run)
    config = load_run(path, args.overrides)
    spec = load_model_config(config.model).spec
    work = workload_of_run(
        config, prompt_tokens=args.mean_prompt, response_tokens=args.mean_response, rescued=args.rescued
    )
    tree = strict.apply_overrides(strict.read_yaml(path), args.overrides)

    def with_storage(plans: list[Plan]) -> tuple[list[Plan], list[Stored]]:
        """Printed, for the first of them."""
        if not any(plan.fits for plan in plans):
            return plans, []
        stored = stored_by_run(config, spec, plans[0].setup.sync_way == "files")
        print("\n".join(["", *storage_lines(stored)]))
        return plans, stored

    if args.search or not tree.get("parallel"):
        return with_storage(_searched(args, spec, gpu, rates, work, sync_of_run(config)))
    plan = make_plan(setup_of_run(config, spec, gpu, rates, work, args.gpus, args.transformer_engine))
    print("\n".join(plan_lines(plan)))
    if not plan.fits:
        print(f"\nDOES NOT FIT: {plan.complaint}\n")
        _searched(args, spec, gpu, rates, work, sync_of_run(config))
        return [plan], []
    print(f"\nAs overrides of a RUN.yaml:\n\n{' '.join(keys_of(plan))}")
    servers, own = servers_of(plan), config.rollout.servers
    if starts_colocated_servers(config) and own != servers:
        print(f"\nThe time is for rollout.servers={servers}; as it stands the run starts {own}.")
    return with_storage([plan])


def _searched(
    args: argparse.Namespace, spec: Any, gpu: Gpu, rates: Rates, work: Any, sync: Sync | None = None
) -> list[Plan]:
    from lens_megatron.planning.activations import CUDA, ENGINE
    from lens_megatron.planning.describe import comparison, keys_of, plan_lines
    from lens_megatron.planning.search import search
    from lens_megatron.planning.syncs import AUTOMATIC

    kernels = ENGINE if args.transformer_engine else CUDA
    found = search(spec, gpu, rates, work, args.gpus, kernels=kernels, sync=sync or AUTOMATIC)
    if found.best:
        print(f"The best of {found.tried} layouts on {args.gpus} x {gpu.name}:\n")
        print("\n".join(comparison(found.best)))
        print("\nThe first in full:\n")
        print("\n".join(plan_lines(found.best[0])))
        print(f"\nAs overrides of a RUN.yaml:\n\n{' '.join(keys_of(found.best[0]))}")
        return found.best
    print(f"None of {found.tried} layouts fits on {args.gpus} x {gpu.name}.")
    if found.nearest is None:
        print("The engine's weights alone do not fit: use more GPUs.")
        return []
    print("The nearest:\n")
    print("\n".join([*plan_lines(found.nearest), f"DOES NOT FIT: {found.nearest.complaint}"]))
    return [found.nearest]


def _calibrate(path: Path) -> int:
    from lens_megatron.output import write_json
    from lens_megatron.planning.calibrate import calibrate
    from lens_megatron.planning.gpus import read_calibration

    known = dict(read_calibration(path)) if path.exists() else {}
    kind, entry = calibrate()
    write_json(path, {**known, kind: entry})
    print(f"{kind} ({entry['device']}):")
    for name, rate in entry["rates"].items():
        print(f"  {name:<10} {rate / 1e9:,.1f} G{'FLOP' if name in ('matmul', 'attention') else 'B'}/s")
    print(path)
    return 0
