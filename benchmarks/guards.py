"""What the guards cost in a step, measured in a run of the toy task's model: python -m benchmarks.guards --out F.md

The share of a step depends on the step: here sequences are short and the model tiny, so that fixed costs weigh most. Guards
after loading and after resuming are once a run, and listed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks._machine import described

STEPS = 12


def measured(folder: Path, ranks: int) -> list[dict[str, float]]:
    """A run's metrics: toy prompts, a model of 2 layers, 256 wide, with random weights, tensor parallel over `ranks`."""
    from lens_megatron.data import toy
    from lens_megatron.mcore.hf_files import random_weights, write_hf_folder
    from lens_megatron.mcore.hf_names import hf_shapes
    from lens_megatron.model_spec import load_model_spec

    shape = folder / "shape"
    toy.write_tokenizer(shape)
    (shape / "config.json").write_text(json.dumps({**toy.model_config(), "hidden_size": 256, "intermediate_size": 768}))
    write_hf_folder(folder / "model", random_weights(hf_shapes(load_model_spec(shape)), seed=1), companions_from=shape)
    toy.write_jsonl(folder / "train.jsonl", toy.prompt_rows(256, seed=0))
    tree = {
        "model": str(folder / "model"),
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "algorithm": "lens",
        "parallel": {"tp": ranks},
        "data": {"train": str(folder / "train.jsonl"), "prompts_per_step": 16},
        "rollout": {"n": 8, "max_response_tokens": 32},
        "checkpoint": {"every": 5},
        "guards": {"replicas_every": 10},
    }
    (folder / "RUN.yaml").write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lens_megatron.cli", "train", str(folder / "RUN.yaml")]
    subprocess.run(command, check=True, env=environment)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def table(lines: list[dict[str, float]]) -> str:
    first, rest = lines[0], lines[1:]
    step = sum(line["time/step"] for line in rest)
    names = sorted({name for line in lines for name in line if name.startswith("time/guards/")})
    rows = ["| guard | after loading, s | of a step, ms | share of steps |", "|---|---|---|---|"]
    for name in names:
        inside = sum(line.get(name, 0.0) for line in rest)
        once = first.get(name, 0.0) if name.endswith("_parity") else 0.0
        rows.append(
            f"| {name.removeprefix('time/guards/')} | {once:.2f} | {1000 * inside / len(rest):.2f} | {inside / step:.3%} |"
        )
    total = sum(line["time/guards"] for line in rest)
    rows.append(f"| together | | {1000 * total / len(rest):.2f} | {total / step:.3%} |")
    median = statistics.median(line["time/step"] for line in rest)
    return "\n".join(rows) + f"\n\n{len(rest)} steps, median {median:.2f} s each.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = ""
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            text += f"## {ranks} rank{'s' * (ranks > 1)}\n\n{table(measured(Path(folder), ranks))}\n"
    text = f"# What the guards cost\n\n`python -m benchmarks.guards`, {described()}\n\n{text.strip()}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
