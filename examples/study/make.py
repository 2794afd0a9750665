"""Makes what the study starts from: the tasks, the base model, and its success rates by `lens-megatron eval` (base.json;
those on the tasks beside the main one in base_tasks.json).

The base model is the committed one, made by `lens-megatron sft examples/study/SFT.yaml`; overrides of SFT.yaml train another.

python -m examples.study.make          (from the repository's root; into runs/study)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from examples.study.task import write_task

FOLDER = Path("runs/study")
FROZEN = Path(__file__).parent / "base"  # what SFT.yaml made, and all committed runs started from
SFT = Path(__file__).parent / "SFT.yaml"
PARTIAL_CREDIT = 'rewards.sources.graded={kind: function, function: "examples.study.graded:score"}'


def make(folder: Path, overrides: list[str], samples: int = 8) -> None:
    from lens_megatron.mcore.hf_files import random_weights, write_hf_folder
    from lens_megatron.mcore.hf_names import hf_shapes
    from lens_megatron.model_spec import load_model_spec

    task, base = folder / "task", folder / "base"
    if not (task / "bare.jsonl").exists():
        write_task(task)
    if not (task / "random").exists():
        weights = random_weights(hf_shapes(load_model_spec(task / "model")), seed=0)
        write_hf_folder(task / "random", weights, companions_from=task / "model")
    if not (base / "hf").exists() and not overrides:  # training it anew might round differently on another machine
        shutil.copytree(FROZEN, base / "hf")
    if not (base / "hf").exists():
        values = [f"model={task / 'random'}", f"run_dir={base}", f"data.train={task / 'sft.jsonl'}", *overrides]
        _run("sft", str(SFT), *values)
    if not (folder / "base.json").exists():
        sets = ",".join(str(task / f"{name}.jsonl") for name in ("noisy", "purified", "clean", "unseen"))
        limits = ("--samples", str(samples), "max_response_tokens=64", "rewards.default.kind=numeric")
        results = ("--out", str(base / "evaluations"), "--json", str(folder / "base.json"))
        _run("eval", str(base / "hf"), "--benchmarks", sets, *limits, *results)
    if not (folder / "base_tasks.json").exists():
        sets = f"{task / 'graded.jsonl'},{task / 'bare.jsonl'}"
        limits = ("--samples", str(samples), "max_response_tokens=64", "rewards.default.kind=numeric", PARTIAL_CREDIT)
        results = ("--out", str(base / "evaluations-tasks"), "--json", str(folder / "base_tasks.json"))
        _run("eval", str(base / "hf"), "--benchmarks", sets, *limits, *results)


def _run(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lens_megatron.cli", command, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of SFT.yaml")
    given = parser.parse_args()
    make(given.out, given.overrides)
    print(f"task and base model: {given.out / 'task'}, {given.out / 'base' / 'hf'}")


if __name__ == "__main__":
    main()
