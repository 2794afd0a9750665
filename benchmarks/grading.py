"""How many ordinary responses a second the rewards judge, with caching off; next to math-verify called plainly.

    python benchmarks/grading.py --json benchmarks/results/grading.json

10,000 distinct responses of some 1,500 characters, half of them right: integers, fractions, decimals, radicals,
expressions, intervals, tuples, lists, units, words. The best of several runs: other work on the machine only ever slows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request

_SENTENCES = (
    "Let us start from what the problem gives us and write it as an equation.",
    "We have $a^2 + b^2 = c^2$, hence $c = \\sqrt{a^2+b^2}$.",
    "Substituting $x = %d$ into the first equation gives $3x + %d = %d$.",
    "This means that the total is $%d \\cdot %d$, which we keep for later.",
    "By symmetry, the second case is the same as the first one.",
    "The number of ways is $\\binom{%d}{2}$, but we have counted %d of them twice.",
    "Note that $\\frac{%d}{%d}$ is already in lowest terms.",
    "Check: if $x = %d$, then the left side is %d, as it should be.",
)


def _answers(draw: random.Random) -> tuple[str, str, str]:
    """A golden answer, another spelling of it, and something else."""
    a, b, c = draw.randint(2, 60), draw.randint(61, 99), draw.randint(2, 9)
    kinds = (
        ("integer",) * 9
        + ("fraction",) * 4
        + ("radical", "radical", "expression", "expression", "decimal", "interval", "tuple", "list", "unit", "word")
    )
    n = draw.randint(-500, 9999)
    return {
        "integer": (f"{n}", f"{n:,}" if abs(n) > 999 else f"{n}", f"{n + 1}"),
        "fraction": (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{{b}}}{{{a}}}"),
        "radical": (rf"{c}\sqrt{{{b}}}", rf"\sqrt{{{c * c * b}}}", rf"{c + 1}\sqrt{{{b}}}"),
        "expression": (rf"{a}x^2 - {b}x + {c}", rf"{c} + {a}x^2 - {b}x", rf"{a}x^2 + {b}x + {c}"),
        "decimal": (f"{a}.{b}", f"{a}.{b}0", f"{a}.{b}1"),
        "interval": (rf"[{a},{b})", rf"\left[{a}, {b}\right)", rf"({a},{b})"),
        "tuple": (f"({a},{-b},{c})", f"({a}, -{b}, {c})", f"({a}, {b}, {c})"),
        "list": (f"{a}, {b}, {c}", f"{c}, {a}, {b}", f"{a}, {b}"),
        "unit": (rf"{a} \text{{ cm}}", rf"{a}\text{{ centimeters}}", rf"{a} \text{{ m}}"),
        "word": (r"\text{parabola}", r"\text{Parabola}", r"\text{ellipse}"),
    }[draw.choice(kinds)]


def ordinary_responses(count: int, seed: int = 0) -> list[tuple[str, str, bool]]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        gold, right, wrong = _answers(draw)
        sentences: list[str] = []
        while sum(len(sentence) for sentence in sentences) < 1500:
            sentence = draw.choice(_SENTENCES)
            sentences.append(sentence % tuple(draw.randint(2, 99) for _ in range(sentence.count("%d"))))
        answer = right if i % 2 else wrong
        rows.append((gold, " ".join(sentences) + f" Therefore, the answer is $\\boxed{{{answer}}}$.", bool(i % 2)))
    return rows


@dataclass(frozen=True)
class Measured:
    per_second: float  # by the clock, best of the repeats
    per_cpu_second: float  # of all processes together, best of the repeats: what other work on the machine changes less
    as_expected: int


def _cpu_seconds(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in [os.getpid(), *pids]]
    return sum(time.user + time.system for time in times)


def through_the_pool(rows: list[tuple[str, str, bool]], workers: int, repeats: int) -> Measured:
    best, best_cpu, right = 0.0, 0.0, 0
    with RewardPool(RewardConfig(workers=workers, cache=0)) as pool:
        pool.grade_all(Request("warm-up", "", gold, response) for gold, response, _ in rows[: 50 * workers])
        for _ in range(repeats):
            start, cpu_start = time.perf_counter(), _cpu_seconds(pool.worker_pids())
            judged = pool.grade_all(Request(str(i), "", gold, text) for i, (gold, text, _) in enumerate(rows))
            best = max(best, len(rows) / (time.perf_counter() - start))
            best_cpu = max(best_cpu, len(rows) / (_cpu_seconds(pool.worker_pids()) - cpu_start))
            right = sum((j.verdict == "correct") == expected for j, (_, _, expected) in zip(judged, rows, strict=True))
    return Measured(best, best_cpu, right)


def plain_math_verify(rows: list[tuple[str, str, bool]], repeats: int) -> Measured:
    """The library as its README calls it: parse both, verify; in this process."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    logging.disable(logging.CRITICAL)
    best, best_cpu, right = 0.0, 0.0, 0
    for gold, text, _ in rows[:50]:
        verify(parse(f"${gold}$"), parse(text))
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), _cpu_seconds([])
        verdicts = [verify(parse(f"${gold}$"), parse(text)) for gold, text, _ in rows]
        best = max(best, len(rows) / (time.perf_counter() - start))
        best_cpu = max(best_cpu, len(rows) / (_cpu_seconds([]) - cpu_start))
        right = sum(verdict == expected for verdict, (_, _, expected) in zip(verdicts, rows, strict=True))
    return Measured(best, best_cpu, right)


def _figures(measured: Measured) -> dict[str, float]:
    return {
        "per_second": round(measured.per_second, 1),
        "per_cpu_second": round(measured.per_cpu_second, 1),
        "as_expected": measured.as_expected,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument(
        "--peer-count", type=int, default=2_000, help="of the same responses, for math-verify in one process"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = ordinary_responses(args.count)
    peer_rows = rows[: args.peer_count]
    ours = through_the_pool(rows, args.workers, args.repeats)
    peer = plain_math_verify(peer_rows, args.repeats)
    result = {
        "responses": len(rows),
        "workers": args.workers,
        "best_of": args.repeats,
        **_figures(ours),
        "math_verify_plain": {"responses": len(peer_rows), "processes": 1, **_figures(peer)},
        "ratio_by_clock": round(ours.per_second / peer.per_second, 1),
        "ratio_by_cpu": round(ours.per_cpu_second / peer.per_cpu_second, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, shared with other work",
        "versions": {
            "python": platform.python_version(),
            "math-verify": version("math-verify"),
            "sympy": version("sympy"),
        },
        "date": date.today().isoformat(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
