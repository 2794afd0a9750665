"""What the study's runs left behind, as the small tidy tables that are committed: a row per run and step, and a row per run.

python -m examples.study.collect       (from the repository's root, on the machine that ran the study)
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
BASES = tuple(  # the base models' success rates, by make.py
    Path("runs/study") / f"{name}.json" for name in ("base", "base_tasks", "base_programs", "before_programs")
)
STUDIES = {"main": Path(__file__).parent / "STUDY.yaml", "pilot": Path(__file__).parent / "PILOT.yaml"}
# in tables of their own, so that they can be run and collected on another machine than the main study
BESIDE = {name: Path(__file__).parent / f"{name.upper()}.yaml" for name in ("graded", "control", "tune", "programs")}
METRICS = (
    *("eval/noisy", "eval/clean", "eval/unseen", "eval/graded", "eval/bare", "eval/decoy", "eval/plain"),
    "eval/graded/reward",
    *("success", "reward", "zero_reward_ratio", "zero_reward_ratio_trained", "zero_signal_ratio", "success_trained"),
    *("groups_destroyed", "groups_revived", "purified_ratio", "improved_ratio", "deleted_tokens_per_prompt"),
    *("rescue/signal_window", "rescue/improvement", "rescue/replaced", "rescue/not_purified"),
    *(f"success_distribution/original/{bucket}" for bucket in ("failure", "low", "mid", "high", "solved")),
    *("purification/tied", "purification/scores_above_floor", "purification/overlap_with_last_time"),
    *(f"purification/planted_{name}" for name in ("precision", "recall", "chance")),
    *("ratio_purified", "ratio_original", "rho_purified_below_0.3", "rho_purified_above_1.2"),
    *("effective_size_rho_purified_tokens", "effective_size_rho_purified_sequences"),
    *("kl", "entropy", "entropy_purified", "grad_norm", "clip_fraction", "positive_mass", "negative_mass"),
    *("transfer/rescued_prompts", "transfer/other_prompts", "transfer/rescued_gain", "transfer/matched_difference"),
    *("response_tokens", "tokens", "sampling/wasted_tokens", "time/step", "time/eval"),
    *(f"sampling/{name}" for name in ("original_rollouts", "purified_rollouts", "original_tokens", "purified_tokens")),
)


def collect_tables(studies: Mapping[str, Path], data: Path) -> int:
    """Finished runs only, added to those that the tables have already: others may have run those. How many there are."""
    import pyarrow
    import pyarrow.parquet as pq

    from lens_megatron.studies.config import load_study
    from lens_megatron.studies.table import collect

    lines: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for name, path in studies.items():
        for result in collect(load_study(path)):
            if result.state.state != "done" or result.run is None:
                continue
            labels = result.cell.labels
            rate = f"lr {labels['optimizer.lr']}" if "optimizer.lr" in labels else ""
            arm = f"{labels.get('arm', '')} {rate}".strip()
            key = {"study": name, "arm": arm, "seed": int(labels["seed"])}
            lines += [{**key, "step": int(line["step"]), **_known(line)} for line in result.run.metrics]
            versions = result.run.versions
            made = {name: versions.get(name) for name in ("started", "lens_megatron", "torch")}
            seconds = round(result.state.seconds or 0)
            runs.append({**key, **made, "seconds": seconds, "set": " ".join(result.state.overrides)})
    if not runs and not (data / "steps.parquet").exists():
        return 0
    data.mkdir(parents=True, exist_ok=True)
    here = {_key(run) for run in runs}
    if (data / "steps.parquet").exists():
        lines = [old for old in pq.read_table(data / "steps.parquet").to_pylist() if _key(old) not in here] + lines
        with (data / "runs.csv").open(newline="", encoding="utf-8") as file:
            runs = [old for old in csv.DictReader(file) if _key(old) not in here] + runs
    lines.sort(key=lambda line: (*_key(line), line["step"]))
    runs.sort(key=_key)
    _write_csv(data / "runs.csv", runs)
    kinds = {"study": pyarrow.string(), "arm": pyarrow.string(), "seed": pyarrow.int32(), "step": pyarrow.int32()}
    columns = {k: pyarrow.array([line[k] for line in lines], kind) for k, kind in kinds.items()}
    columns |= {k: pyarrow.array([line.get(k) for line in lines], pyarrow.float32()) for k in METRICS}
    pq.write_table(pyarrow.table(columns), data / "steps.parquet", compression="zstd")
    return len(runs)


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["study"], row["arm"], int(row["seed"])


def _known(line: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(line[k]) for k in METRICS if isinstance(line.get(k), (int, float)) and line[k] == line[k]}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["study"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", action="append", metavar="NAME=STUDY.yaml", help="instead of all that the page shows"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    given = parser.parse_args()
    studies = dict(pair.split("=", 1) for pair in given.study or [])
    given.data.mkdir(parents=True, exist_ok=True)
    for base in BASES:
        if base.exists():
            shutil.copyfile(base, given.data / base.name)
    count = collect_tables({name: Path(path) for name, path in studies.items()} or STUDIES, given.data)
    if not studies:
        count += collect_tables(BESIDE, given.data / "beside")
    print(f"{count} finished runs in {given.data}")


if __name__ == "__main__":
    main()
