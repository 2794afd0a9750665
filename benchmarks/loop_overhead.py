"""The loop's own time: what a step costs outside model compute, generation and weight sync.

    python -m benchmarks.loop_overhead --prompts 128 256 512 1024 --json benchmarks/results/loop_overhead.json

The real loop, trainer, host, rollout driver (a process of its own), sampler, packing, Megatron schedule, loss, metrics
and files; only two things are stubs: an engine whose responses are ready at once, and a model whose log-probs are a table
look-up. The stubs' own time is taken out. Half of the prompts are rescued, so a step holds about 1.5 n rollouts a prompt.

The headline counts CPU seconds, which other work on the machine stretches far less than wall seconds; those stand beside
them. What the other ranks are sent is pickled and read back once, as a broadcast does it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from benchmarks._loop_stubs import StubSaver, stub_model, stub_sampler, write_model, write_prompts
from benchmarks._machine import machine
from benchmarks._profile import Profile
from lens_megatron.algorithms.filters import PromptFilter

TARGET_SECONDS, TARGET_PROMPTS = 3.0, 128
# A table look-up is no model of the files, and its engine has other log-probs: benchmarks/guards.py measures the guards.
GUARDS_OFF = {
    **dict.fromkeys(("hf_parity", "export_parity", "first_step", "engine_weights", "resume_parity"), False),
    "replicas_every": 0,
    "on_logprob_diff": "report",
}
NOT_THE_LOOPS_OWN = ("stub model", "stub engine", "weight sync")


# Where the time goes: each section's own, without the sections called from within.


def sections() -> dict[str, list[tuple[Any, str]]]:
    from lens_megatron import host, run_folder, trainer, update
    from lens_megatron.mcore import logprobs, pipeline, step

    return {
        "choose prompts": [(host.Host, "next_prompts")],
        "purify": [(host, "purify")],
        "rebuild groups": [(host, "rebuild_group")],
        "filter": [(PromptFilter, "accept"), (PromptFilter, "finish")],
        "samples, advantages": [(host, "samples_of_group")],
        "evaluate: tensors, pairs": [(trainer, "evaluate_samples"), (update, "_score_responses")],
        "update: tensors": [(trainer, "update_policy"), (update, "minibatch_loss")],
        "update: flattening": [(update, "_flat")],
        "packing plan": [(logprobs, "plan_for_this_layout"), (step, "plan_for_this_layout")],
        "packs as tensors": [(pipeline, "pack_tensors")],
        "gather scores": [(logprobs, "score_sequences"), (step, "score_sequences")],
        "schedule, loss, backward": [(logprobs, "forward_only"), (step, "forward_backward")],
        "loss": [(update, "policy_loss")],
        "metrics": [(host.Host, "step_metrics"), (update, "finish_metrics"), (step, "sum_metrics")],
        "rollout rows (decoding)": [(host.Host, "rollout_rows")],
        "rollout table": [(run_folder, "rollout_table")],
        "write files": [(run_folder.RunFolder, "write_rollouts"), (run_folder.RunFolder, "append_metrics")],
        "weight sync": [(trainer.Trainer, "sync_weights")],
        "prompt scores": [(trainer.Trainer, "score_prompts")],
        "finish step, rest": [(trainer.Trainer, "finish_step")],
    }


@contextlib.contextmanager
def instrumented(profile: Profile) -> Iterator[None]:
    from lens_megatron import trainer
    from lens_megatron.rollout.driver import RolloutDriver

    def sample(self: RolloutDriver, *args: Any) -> Any:
        """The caller's CPU is spent on the pipe; the driver's is its own."""
        process, stub = psutil.Process(self.pid), self.state_dict()["engine_seconds"]
        before = process.cpu_times()
        with profile.section("pipe from the driver"):
            result = real_sample(self, *args)
        after = process.cpu_times()
        stub = self.state_dict()["engine_seconds"] - stub
        profile.add("stub engine", stub)
        profile.add("driver: sampler and pipe", after.user + after.system - before.user - before.system - stub)
        return result

    def broadcast(work: Callable[[], Any], what: str, silence_s: float = 0.0) -> Any:
        result = work()
        with profile.section("broadcast (pickle, read once)"):
            pickle.loads(pickle.dumps(result))
        return result

    real_sample = RolloutDriver.sample
    with contextlib.ExitStack() as stack:
        for name, places in sections().items():
            for owner, attribute in places:
                if hasattr(owner, attribute):
                    wrapped = profile.timed(name, getattr(owner, attribute))
                    stack.enter_context(patch.object(owner, attribute, wrapped))
        stack.enter_context(patch.object(RolloutDriver, "sample", sample))
        stack.enter_context(patch.object(trainer, "from_rank_zero", broadcast))
        yield


# One measurement.


@dataclass
class Measured:
    prompts: int
    rollouts: int
    tokens: int
    seconds: float  # CPU, a step, main process and driver, stubs taken out; the median of the steps
    wall_seconds: float
    profile: dict[str, float]  # CPU seconds a step


def measure(prompts: int, n: int, response_tokens: int, steps: int, folder: Path) -> Measured:
    """`steps` measured steps after one that warms up."""
    from lens_megatron import loop, trainer
    from lens_megatron.config import load_run
    from lens_megatron.model_spec import load_model_config
    from lens_megatron.run_folder import RunFolder

    write_model(folder / "model")
    write_prompts(folder / "train.jsonl", prompts)
    tree = {
        "model": str(folder / "model"),
        "run_dir": str(folder / "run"),
        "steps": steps + 1,
        "algorithm": "lens",
        "data": {"train": str(folder / "train.jsonl"), "prompts_per_step": prompts, "max_prompt_tokens": 512},
        "rollout": {"n": n, "max_response_tokens": response_tokens, "schedule": "early"},
        "update": {"tokens_per_microbatch": 16384},
        "checkpoint": {"every": 0},
        "guards": GUARDS_OFF,
        "precision": "fp32",
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    config = load_run(folder / "run.yaml", [])
    profile = Profile()
    marks: list[tuple[dict[str, float], float]] = []
    real_begin = trainer.Trainer.begin_step

    def mark() -> None:
        driver = profile.cpu.get("driver: sampler and pipe", 0.0) + profile.cpu.get("stub engine", 0.0)
        # the driver's time is not this process's: added, so that the total has both
        marks.append(({**profile.cpu, "total": time.process_time() + driver}, time.perf_counter()))

    def begin_step(self: Any, step: int) -> None:
        mark()
        real_begin(self, step)

    model = load_model_config(config.model)
    build = functools.partial(stub_model, profile)
    with (
        patch.dict("lens_megatron.host._SAMPLERS", embedded=stub_sampler),
        patch.object(trainer, "build_trainable", build),
        patch.object(trainer, "build_frozen", functools.partial(build, shift=0.01)),
        patch.object(trainer, "Saver", StubSaver),
        instrumented(profile),
        patch.object(trainer.Trainer, "begin_step", begin_step),
    ):
        run = trainer.Trainer(config, model, RunFolder.create(config.run_dir))
        try:
            loop.train(config, run)
            mark()
        finally:
            run.close()
    names = list(marks[-1][0])
    steps_cpu = [
        {name: after[0][name] - before[0].get(name, 0.0) for name in names} for before, after in pairwise(marks[1:])
    ]
    own = [step["total"] - sum(step.get(name, 0.0) for name in NOT_THE_LOOPS_OWN) for step in steps_cpu]
    middle = {name: statistics.median(step[name] for step in steps_cpu) for name in names if name != "total"}
    middle["everything else"] = statistics.median(step["total"] - sum(step[n] for n in middle) for step in steps_cpu)
    rows = RunFolder.open(config.run_dir).read_rollout_columns(steps, ["response"])
    return Measured(
        prompts=prompts,
        rollouts=len(rows),
        tokens=sum(len(row["response"]) for row in rows),
        seconds=statistics.median(own),
        wall_seconds=statistics.median(after[1] - before[1] for before, after in pairwise(marks[1:])),
        profile=dict(sorted(middle.items(), key=lambda item: -item[1])),
    )


def in_a_process_of_its_own(prompts: int, args: argparse.Namespace) -> Measured:
    """Megatron is initialised once a process."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, prompts, args.n, args.response_tokens, args.steps, Path(folder)).result()


def table(results: Sequence[Measured]) -> str:
    names = list(results[0].profile)
    head = ["CPU seconds a step", *(f"{r.prompts} prompts" for r in results)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(results)]
    lines.append("| **the loop's own** | " + " | ".join(f"**{r.seconds:.2f}**" for r in results) + " |")
    for name in names:
        label = f"({name}, not counted)" if name in NOT_THE_LOOPS_OWN else name
        lines.append(f"| {label} | " + " | ".join(f"{r.profile.get(name, 0.0):.3f}" for r in results) + " |")
    lines.append("| rollouts | " + " | ".join(f"{r.rollouts:,}" for r in results) + " |")
    lines.append("| response tokens | " + " | ".join(f"{r.tokens:,}" for r in results) + " |")
    lines.append("| wall seconds, all | " + " | ".join(f"{r.wall_seconds:.1f}" for r in results) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="a Markdown table is written beside it")
    args = parser.parse_args()
    results = [in_a_process_of_its_own(prompts, args) for prompts in args.prompts]
    print(table(results))
    growth = (results[-1].seconds / results[0].seconds) / (results[-1].prompts / results[0].prompts)
    print(f"\ngrowth over {results[0].prompts} -> {results[-1].prompts} prompts: {growth:.2f} of linear")
    if args.json:
        tree = {
            **machine(),
            "n": args.n,
            "response_tokens": args.response_tokens,
            "steps": args.steps,
            "target": {"prompts": TARGET_PROMPTS, "seconds": TARGET_SECONDS},
            "growth_against_linear": round(growth, 3),
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(table(results) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
