"""The whole of what one GPU can show, in one command of under 8 minutes:

    python -m benchmarks.gpu [--json benchmarks/results/gpu_h200.json] [--parts head,step] [--smoke]

Every part is on its own: one that fails is reported, and the others still run. `--smoke` is the same code with tiny shapes,
for a machine without a GPU; its figures mean nothing.

    matmul      the rate of a large bf16 product: what everything else is a share of
    correct     each head against fp64, on this device
    head        time, TFLOP/s and memory: ours, materialised logits, torch.compile over chunks, Liger-Kernel
    step        training tokens/s and model FLOP utilisation, packed and padded
    scoring     prompt scoring tokens/s
    export      weights to the host, against a copy on the device
    checkpoint  seconds to save, and seconds that training waits
    tiles       the two kernels by tile sizes, to choose head_triton's table by
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._gpu_bench import SMOKE, Bench, Row, Size, free, ms, table, tera
from benchmarks._gpu_heads import correct, head, tiles
from benchmarks._gpu_training import checkpoint, export, scoring, step
from benchmarks._machine import machine
from benchmarks._work import median_seconds


def matmul(bench: Bench) -> list[Row]:
    n = bench.size.matmul
    a, b = bench.normal(n, n), bench.normal(n, n)
    seconds = median_seconds(lambda: a @ b, 4 * bench.size.repeats, warm_up=3)
    bench.rate = 2 * n**3 / seconds
    return [{"shape": f"{n}^3", "ms": ms(seconds), "tflops": tera(bench.rate)}]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "matmul": matmul,
    "correct": correct,
    "head": head,
    "step": step,
    "scoring": scoring,
    "export": export,
    "checkpoint": checkpoint,
    "tiles": tiles,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="everything that one GPU can show")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--limit-s", type=float, default=480.0, help="no part is started later (default 480)")
    parser.add_argument("--json", metavar="F")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - PARTS.keys()):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not arguments.smoke:
        parser.error("no GPU here; --smoke runs the same code on tiny shapes")
    torch.manual_seed(0)
    bench = Bench(SMOKE if arguments.smoke else Size())
    device = torch.cuda.get_device_name() if bench.gpu else "cpu"
    result: dict[str, Any] = {"device": device, "smoke": arguments.smoke, **machine(), "parts": {}, "seconds": {}}
    began = time.perf_counter()
    for name in parts:
        start = time.perf_counter()
        if start - began > arguments.limit_s:
            rows: list[Row] = [{"skipped": f"{arguments.limit_s:.0f} s were over"}]
        else:
            try:
                rows = PARTS[name](bench)
            except Exception as error:  # one part's failure is a result, too
                traceback.print_exc()
                rows = [{"failed": f"{type(error).__name__}: {error}"}]
        free()
        result["parts"][name] = rows
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        print(f"\n{name} ({result['seconds'][name]} s)\n{table(rows)}", flush=True)
        if arguments.json:  # after every part: a machine that is taken away takes the rest only
            Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    failed = [
        name for name, rows in result["parts"].items() if any("failed" in row or row.get("ok") is False for row in rows)
    ]
    print(f"\n{device}, {time.perf_counter() - began:.0f} s" + (f"; failed in: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
