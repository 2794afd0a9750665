"""Makes what the study starts from: the tasks, the base models, and their success rates by `lens-megatron eval` (base.json;
those on the tasks beside the main one in base_tasks.json, those of the list programs in base_programs.json).

The base models are the committed ones, made by `lens-megatron sft examples/study/SFT.yaml` and, for the list programs, by
PROGRAMS_BEFORE.yaml and then PROGRAMS_SFT.yaml. Overrides of SFT.yaml train another one for the stories.

python -m examples.study.make          (from the repository's root; into runs/study)
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from examples.study.programs import write_programs
from examples.study.task import write_task

FOLDER = Path("runs/study")
FROZEN = Path(__file__).parent / "base"  # what SFT.yaml made, and all committed runs started from
PROGRAMS = {name: Path(__file__).parent / f"programs_{name}" for name in ("before", "base")}
SFT = Path(__file__).parent / "SFT.yaml"
PARTIAL_CREDIT = 'rewards.sources.graded={kind: function, function: "examples.study.graded:score"}'


def make(folder: Path, overrides: list[str], samples: int = 8) -> None:
    task, base = folder / "task", folder / "base"
    if not (task / "bare.jsonl").exists():
        write_task(task)
    _untrained(task)
    if not (base / "hf").exists() and not overrides:  # training it anew might round differently on another machine
        shutil.copytree(FROZEN, base / "hf")
    if not (base / "hf").exists():
        values = [f"model={task / 'random'}", f"run_dir={base}", f"data.train={task / 'sft.jsonl'}", *overrides]
        _run("sft", str(SFT), *values)
    sets = [task / f"{name}.jsonl" for name in ("noisy", "purified", "clean", "unseen")]
    _evaluate(base / "hf", sets, samples, 64, folder / "base.json", "rewards.default.kind=numeric")
    sets = [task / "graded.jsonl", task / "bare.jsonl"]
    _evaluate(
        base / "hf", sets, samples, 64, folder / "base_tasks.json", "rewards.default.kind=numeric", PARTIAL_CREDIT
    )


def make_programs(folder: Path, samples: int = 8) -> None:
    task = folder / "programs"
    if not (task / "weak.jsonl").exists():
        write_programs(task)
    _untrained(task)
    for name, frozen in PROGRAMS.items():
        if not (task / name / "hf").exists():
            shutil.copytree(frozen, task / name / "hf")
        sets = [task / f"{split}.jsonl" for split in ("decoy", "purified", "weak", "plain")]
        _evaluate(task / name / "hf", sets, samples, 96, folder / f"{name}_programs.json", "rewards.default.kind=exact")


def _untrained(task: Path) -> None:
    """random/: what `sft` starts from."""
    from lens_megatron.mcore.hf_files import random_weights, write_hf_folder
    from lens_megatron.mcore.hf_names import hf_shapes
    from lens_megatron.model_spec import load_model_spec

    if not (task / "random").exists():
        weights = random_weights(hf_shapes(load_model_spec(task / "model")), seed=0)
        write_hf_folder(task / "random", weights, companions_from=task / "model")


def _evaluate(model: Path, sets: list[Path], samples: int, tokens: int, results: Path, *rewards: str) -> None:
    if not results.exists():
        out = model.parent / f"evaluations-{results.stem}"
        limits = ("--samples", str(samples), f"max_response_tokens={tokens}", *rewards)
        names = ",".join(map(str, sets))
        _run("eval", str(model), "--benchmarks", names, *limits, "--out", str(out), "--json", str(results))


def _run(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lens_megatron.cli", command, *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of SFT.yaml")
    given = parser.parse_args()
    make(given.out, given.overrides)
    print(f"task and base model: {given.out / 'task'}, {given.out / 'base' / 'hf'}")
    if not given.overrides:
        make_programs(given.out)
        print(f"list programs: {given.out / 'programs'}")


if __name__ == "__main__":
    main()
