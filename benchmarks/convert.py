"""Conversion against `cp` of the same bytes: time and peak memory, on a random model in the exact shape of a real one.

    python -m benchmarks.convert --model qwen3-1.7b --folder /scratch --out benchmarks/results/convert

Every command is a process of its own and is timed whole, imports included, until its bytes are on disk: the converters sync
by themselves, `cp` is followed by an fsync of what it wrote, and its time without that is kept too. Before each command the
source is evicted from the page cache (cold) or read into it (warm). Rounds are interleaved, and the best of each command
counts: other work on the machine only ever slows. The load average before every command is kept beside its time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from lens_megatron.model_spec import load_model_spec
from lens_megatron.planning.parameters import count_parameters

GIB = 2**30


def make_source(model: str, folder: Path) -> None:
    """In a process of its own: a child's peak memory begins with its parent's."""
    from lens_megatron.hf_config import to_hf_config
    from lens_megatron.mcore.hf_files import write_hf_folder
    from lens_megatron.model_spec import load_model_spec

    spec = load_model_spec(model)
    write_hf_folder(folder, random_tensors(spec))
    (folder / "config.json").write_text(json.dumps(to_hf_config(spec, "bfloat16")))


def random_tensors(spec: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """bf16 of random bits with a common exponent: no two tensors alike, and cheap to make."""
    import torch

    from lens_megatron.mcore.hf_names import hf_shapes

    generator = torch.Generator().manual_seed(0)
    for name, shape in hf_shapes(spec).items():
        bits = torch.randint(-(2**15), 2**15, (math.prod(shape),), dtype=torch.int16, generator=generator)
        yield name, ((bits & -32641) | 0x3C00).view(torch.bfloat16).reshape(shape)


def timed(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of one process."""
    load = os.getloadavg()[0]
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": cpu,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "load": load,
    }


def sync_and_evict(folder: Path) -> float:
    """Seconds until the folder is on disk; its pages are then dropped."""
    start = time.monotonic()
    handles = [os.open(path, os.O_RDONLY) for path in folder.rglob("*") if path.is_file()]
    for handle in handles:
        os.fsync(handle)
    seconds = time.monotonic() - start
    for handle in handles:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return seconds


def read_through(folder: Path) -> None:
    """Into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def one_round(source: Path, work: Path, cache: str) -> dict[str, dict[str, float]]:
    """`cache`: cold, nothing of a source is in memory; warm, all of it is. Nothing of a target ever is."""
    copied, checkpoint, back = work / "copied", work / "checkpoint", work / "back"
    program = [sys.executable, "-m", "lens_megatron.cli", "convert"]
    found = {}

    def prepare(folder: Path) -> None:
        sync_and_evict(folder)
        if cache == "warm":
            read_through(folder)

    def copy(folder: Path) -> dict[str, float]:
        """Files are not equally fast to read, even on one disk: each conversion is held against cp of its own source."""
        prepare(folder)
        run = timed(["cp", "-r", str(folder), str(copied)])
        run["seconds_until_return"] = run["seconds"]
        run["seconds"] += sync_and_evict(copied)
        shutil.rmtree(copied)
        return run

    found["cp HF"] = copy(source)
    prepare(source)
    found["hf-to-megatron"] = timed([*program, "hf-to-megatron", str(source), str(checkpoint)])
    found["cp Megatron"] = copy(checkpoint)
    prepare(checkpoint)
    found["megatron-to-hf"] = timed([*program, "megatron-to-hf", str(checkpoint), str(back)])
    shutil.rmtree(checkpoint)
    shutil.rmtree(back)
    return found


def machine() -> dict[str, Any]:
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {"cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory / GIB, 1)}


CP_OF = {"hf-to-megatron": "cp HF", "megatron-to-hf": "cp Megatron"}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Best times; of a conversion also its ratio to `cp` and its sync, and to `cp` alone."""
    best = {name: min(run["seconds"] for run in of_name) for name, of_name in runs.items()}
    found = {name: {"best": seconds} for name, seconds in best.items()}
    for name, copy in CP_OF.items():
        returned = min(run["seconds_until_return"] for run in runs[copy])
        found[name] |= {"to_cp_with_sync": best[name] / best[copy], "to_cp_alone": best[name] / returned}
    return found


def report(result: dict[str, Any]) -> str:
    lines = [f"# Conversion of {result['model']} ({result['bytes'] / GIB:.2f} GiB in bf16) against cp", ""]
    for cache, runs in result["rounds"].items():
        lines += [
            f"{cache.capitalize()} cache:",
            "",
            "| command | seconds, each round (load average) | best | to cp + fsync | to cp alone | CPU s | peak RSS |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for name, of_name in runs.items():
            seconds = ", ".join(f"{run['seconds']:.1f} ({run['load']:.0f})" for run in of_name)
            peak = max(run["peak_rss_bytes"] for run in of_name) / GIB
            found = result["summary"][cache][name]
            ratios = [f"{found[kind]:.2f}" if kind in found else "" for kind in ("to_cp_with_sync", "to_cp_alone")]
            times = f"{found['best']:.1f} | {ratios[0]} | {ratios[1]}"
            cpu = min(run["cpu_seconds"] for run in of_name)
            lines.append(f"| {name} | {seconds} | {times} | {cpu:.1f} | {peak:.2f} GiB |")
        alone = (min(run["seconds_until_return"] for run in runs[name]) for name in CP_OF.values())
        both = " and ".join(f"{seconds:.1f}" for seconds in alone)
        lines += ["", f"cp until it returns, which is before its bytes are on disk: {both} s at best.", ""]
    m = result["machine"]
    return "\n".join(
        [
            *lines,
            "All seconds are of a process from its start until its bytes are on disk;",
            f"{result['imports']:.1f} s of a conversion's are Python and imports.",
            "Cold: nothing of the source is in the page cache; warm: all of it is.",
            f"Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB; {result['versions']}; {result['date']}.",
            f"Command: `python -m benchmarks.convert --model {result['model']}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of conversion against cp")
    parser.add_argument("--model", default="qwen3-1.7b", help="a shipped name")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk with room for three copies"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    if args.make:
        make_source(args.model, args.make)
        return
    size = 2 * count_parameters(load_model_spec(args.model))
    free = shutil.disk_usage(args.folder).free
    if free < 3.2 * size:
        raise SystemExit(f"{args.folder}: {free / GIB:.1f} GiB free, {3.2 * size / GIB:.1f} are needed")
    work = args.folder / f"convert-benchmark-{os.getpid()}"
    work.mkdir()
    try:
        source = work / "source"
        subprocess.run([sys.executable, __file__, "--model", args.model, "--make", str(source)], check=True)
        imports = timed([sys.executable, "-c", "import checkpoints_tools.megatron_to_hf"])["seconds"]
        rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
        for _ in range(args.rounds):
            for cache in ("cold", "warm"):
                for name, run in one_round(source, work, cache).items():
                    rounds.setdefault(cache, {}).setdefault(name, []).append(run)
    finally:
        shutil.rmtree(work)
    result = {
        "model": args.model,
        "bytes": size,
        "rounds": rounds,
        "summary": {cache: summary(runs) for cache, runs in rounds.items()},
        "imports": imports,
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
        "date": datetime.date.today().isoformat(),
    }
    text = report(result)
    print(text)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
