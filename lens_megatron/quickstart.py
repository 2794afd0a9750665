"""The first run: toy task, base model, GRPO and LENS for the same steps, a report. Every part is cached in its folder.

It runs the same commands that a user would, on the files that it leaves behind to be read and changed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lens_megatron.errors import RunError
from lens_megatron.run_folder import RunFolder

ALGORITHMS = ("grpo", "lens")
# Enough to solve most plain stories, few misleading ones, and to leave room: examples/toy/README.md.
_BASE_STEPS = 900


@dataclass(frozen=True)
class Outcome:
    name: str
    first: float  # success rate over the first and the last fifth of the steps
    last: float
    zero_reward_first: float
    zero_reward_last: float
    held_out_base: float  # success on problems that were not trained on
    held_out: float


def quickstart(folder: Path, steps: int) -> list[Outcome]:
    toy, base = folder / "toy", folder / "base"
    if not (toy / "test.jsonl").exists():
        _say("writing the toy task")
        make_toy(toy)
    if not (base / "hf").exists():
        _say(f"training a base model on worked solutions ({_BASE_STEPS} steps)")
        _run("sft", _write(folder / "base.yaml", base_config(toy, base)))
    for name in ALGORITHMS:
        config = _write(folder / f"{name}.yaml", run_config(toy, base / "hf", folder / name, name, steps))
        done = RunFolder(folder / name)
        if not done.holds_run():
            _say(f"training with {name} ({steps} steps)")
            _run("train", config)
        elif max((row["step"] for row in done.read_metrics()), default=0) < steps:
            _say(f"going on with {name}")
            _run("train", config, "--resume")
    report = folder / "report.html"
    _run("report", *(str(folder / name) for name in ALGORITHMS), "--out", str(report))
    return [outcome(name, RunFolder.open(folder / name).read_metrics()) for name in ALGORITHMS]


def make_toy(folder: Path) -> None:
    """Data, and a model of random weights."""
    from lens_megatron.data.toy import write_toy
    from lens_megatron.mcore.hf_files import random_weights, write_hf_folder
    from lens_megatron.mcore.hf_names import hf_shapes
    from lens_megatron.model_spec import load_model_spec

    write_toy(folder)
    if not (folder / "random").exists():
        weights = random_weights(hf_shapes(load_model_spec(folder / "model")), seed=0)
        write_hf_folder(folder / "random", weights, companions_from=folder / "model")


def base_config(toy: Path, run_dir: Path) -> dict[str, Any]:
    return {
        "model": str(toy / "random"),
        "run_dir": str(run_dir),
        "steps": _BASE_STEPS,
        "data": {"train": str(toy / "sft.jsonl"), "prompts_per_step": 32, "shuffle": False},
        "parallel": {"dp": 2},
        "prompt_loss_weight": 0.15,
        "optimizer": {
            "lr": 4.0e-3,
            "min_lr": 4.0e-4,
            "schedule": "cosine",
            "warmup_steps": 50,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
        },
    }


def run_config(toy: Path, model: Path, run_dir: Path, algorithm: str, steps: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "run_dir": str(run_dir),
        "steps": steps,
        "algorithm": algorithm,
        "parallel": {"tp": 2},
        "data": {"train": str(toy / "train.jsonl"), "prompts_per_step": 16},
        "evaluation": {"every": max(1, steps // 5), "benchmarks": [str(toy / "test.jsonl")]},
        "rollout": {"n": 8, "max_response_tokens": 96, "schedule": "speculative"},
        "rewards": {"default": {"kind": "numeric"}, "workers": 1},
        "optimizer": {"lr": 1.0e-4},
        "update": {"tokens_per_microbatch": 8192},
        "checkpoint": {"every": 20, "keep": 1},
    }


def outcome(name: str, metrics: Sequence[dict[str, Any]]) -> Outcome:
    held_out = [float(row["eval/test"]) for row in metrics if "eval/test" in row]
    metrics = [row for row in metrics if row["step"] > 0]  # step 0 is the evaluation of the base model
    part = max(1, len(metrics) // 5)

    def mean(key: str, rows: Sequence[dict[str, Any]]) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    return Outcome(
        name,
        mean("success", metrics[:part]),
        mean("success", metrics[-part:]),
        mean("zero_reward_ratio", metrics[:part]),
        mean("zero_reward_ratio", metrics[-part:]),
        held_out[0],
        held_out[-1],
    )


def _say(text: str) -> None:
    print(f"== {text}", flush=True)


def _write(path: Path, tree: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return str(path)


def _run(command: str, *arguments: str) -> None:
    with subprocess.Popen([sys.executable, "-m", "lens_megatron.cli", command, *arguments]) as process:
        try:
            code = process.wait()
        except BaseException:  # told to end: so is the part that runs, which closes its files and workers
            process.terminate()
            raise
    if code:
        raise RunError(f"lens-megatron {command} {' '.join(arguments)} ended with exit code {code}")
