"""The paper's seven benchmarks: where they come from, how many samples they take, and what is wrong in their files.

Problems are never shipped. They are read from a folder of JSON lines ({"id", "problem", "answer"}, one file each), or
from the Hugging Face hub. Repairs below touch golden answers only, and hold no text of a problem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_megatron import strict
from lens_megatron.data.files import read_files
from lens_megatron.errors import UsageError
from lens_megatron.rewards.config import RewardRule

ALTERNATIVE = " ||| "  # between answers that are each right


@dataclass(frozen=True)
class Problem:
    id: str
    problem: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    name: str
    title: str  # as in the paper's tables
    size: int
    samples: int  # k: 1 is Pass@1, 16 is Average@16
    hub_id: str
    hub_split: str
    hub_columns: tuple[str, str]  # of the problem and the answer
    hub_size: int | None = None  # where the hub's copy has another number of rows

    @property
    def file_name(self) -> str:
        return f"{self.name}.jsonl"


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", "MATH500", 500, 1, "HuggingFaceH4/MATH-500", "test", ("problem", "answer")),
        Benchmark("amc23", "AMC23", 40, 16, "math-ai/amc23", "test", ("question", "answer")),
        Benchmark("aime24", "AIME24", 30, 16, "HuggingFaceH4/aime_2024", "train", ("problem", "answer")),
        Benchmark("aime25", "AIME25", 30, 16, "math-ai/aime25", "test", ("problem", "answer")),
        Benchmark("gaokao2023en", "GaokaoEN-2023", 385, 1, "MARIO-Math-Reasoning/Gaokao2023-Math-En", "train",
        ("question", "answer")),
        Benchmark("minerva_math", "Minerva", 272, 1, "math-ai/minervamath", "test", ("question", "answer")),
        Benchmark("olympiadbench", "OlympiadBench", 675, 1, "math-ai/olympiadbench", "test", ("question",
        "final_answer"), 674),
    )
}  # fmt: skip
_ALIASES = {"minerva": "minerva_math", "gaokao": "gaokao2023en", "gaokaoen-2023": "gaokao2023en", "math-500": "math500"}

# How answers to the benchmarks are judged: as in training, with the alternatives that a repair may have added.
RULE = RewardRule(alternatives=ALTERNATIVE.strip())

# Golden answers that no right response could match as they stand.
_REPAIRS: dict[str, dict[str, str]] = {
    "gaokao2023en": {
        "$145$solution:": "145",  # the next field's name
        # asks for one
        "$2$ or $-2$ or $\\frac{1}{2}$ or $-\\frac{1}{2}$": ALTERNATIVE.join(["2", "-2", "1/2", "-1/2"]),
    },
    "minerva_math": {"np.arcsin(10/13)": r"\arcsin(10/13)"},
    "olympiadbench": {
        "$t(0,4]$": "(0,4]",
        "$221,$8$": "221,8",
        "4.2": ALTERNATIVE.join(["4.2", r"4.2\%"]),  # asks for r of "r %"
        r"$\angle B E A_{1}=90$,$\angle A E B_{1}=90$": ALTERNATIVE.join(["90", "90, 90", r"90^\circ, 90^\circ"]),
    },
}
# A question for a percentage whose answer bears no sign: 75 and 75% are both right.
_ASKS_PERCENT = re.compile(
    r"\bwhat (?:is the )?percent|\bas a percent|\(in percent\)|\bpercentage (?:increase|decrease)", re.IGNORECASE
)
_BARE_NUMBER = re.compile(r"\$?-?\d+(?:\.\d+)?(?:\\frac\{?\d+\}?\{?\d+\}?)?\$?")


def select_benchmarks(names: str) -> list[Benchmark]:
    """`all`, or names separated by commas, in the order given."""
    if names.strip() == "all":
        return list(BENCHMARKS.values())
    chosen: list[Benchmark] = []
    for name in (part.strip() for part in names.split(",") if part.strip()):
        known = BENCHMARKS.get(_ALIASES.get(name.lower(), name.lower()))
        if known is None:
            raise UsageError(f"benchmark {name!r}: not one of all, {', '.join(BENCHMARKS)}")
        if known not in chosen:
            chosen.append(known)
    if not chosen:
        raise UsageError(f"--benchmarks {names!r}: give all, or some of {', '.join(BENCHMARKS)}")
    return chosen


def load_benchmark(benchmark: Benchmark, folder: Path | None) -> list[Problem]:
    """From NAME.jsonl in a folder; without a folder, from the hub. Every row, with the repairs made."""
    if folder is None:
        problems = _from_hub(benchmark)
        wanted = benchmark.hub_size or benchmark.size
    else:
        problems = _from_file(benchmark, folder)
        wanted = benchmark.size
    where = folder / benchmark.file_name if folder is not None else benchmark.hub_id
    if len(problems) != wanted:
        raise UsageError(f"{where}: {len(problems)} problems, expected {wanted}: another edition of {benchmark.title}?")
    if len({problem.id for problem in problems}) != len(problems):
        raise UsageError(f"{where}: two problems have the same id")
    repaired = [repair(benchmark.name, problem) for problem in problems]
    empty = [problem.id for problem in repaired if not problem.answer.strip()]
    if empty:
        raise UsageError(
            f"{where}: no answer for {', '.join(empty[:3])}; put the corrected rows in {benchmark.name}_fixes.json"
        )
    return repaired


def repair(benchmark: str, problem: Problem) -> Problem:
    """A golden answer that a right response can match."""
    answer = _REPAIRS.get(benchmark, {}).get(problem.answer.strip(), problem.answer)
    if _BARE_NUMBER.fullmatch(answer.strip()) and _ASKS_PERCENT.search(problem.problem):
        number = answer.strip().strip("$")
        answer = f"{number}{ALTERNATIVE}{number}\\%"
    return replace(problem, answer=answer)


def _from_file(benchmark: Benchmark, folder: Path) -> list[Problem]:
    path = folder / benchmark.file_name
    if not path.is_file():
        raise UsageError(f"{path}: No such file or directory; --data names the folder with the benchmarks' files")
    problems = [_checked(where, row) for where, row in strict.read_json_lines(path)]
    fixes = _fixes(folder / f"{benchmark.name}_fixes.json")
    unknown = set(fixes) - {problem.id for problem in problems}
    if unknown:
        raise UsageError(f"{folder / f'{benchmark.name}_fixes.json'}: no problem {sorted(unknown)[0]!r} in {path.name}")
    return [fixes.get(problem.id, problem) for problem in problems]


def _fixes(path: Path) -> dict[str, Problem]:
    """Corrected rows, by the id of the row they stand for."""
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UsageError(f"{path}: expected a list of corrected rows")
    return {problem.id: problem for problem in (_checked(str(path), row) for row in rows)}


def _checked(where: str, row: Any) -> Problem:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("id", "problem", "answer")):
        raise UsageError(f'{where}: expected {{"id": TEXT, "problem": TEXT, "answer": TEXT}}')
    return Problem(row["id"], row["problem"], row["answer"])


def _from_hub(benchmark: Benchmark) -> list[Problem]:
    problem_key, answer_key = benchmark.hub_columns
    problems = []
    for index, (where, row) in enumerate(read_files(benchmark.hub_id, benchmark.hub_split)):
        if problem_key not in row or answer_key not in row:
            raise UsageError(f"{where}: no {problem_key!r} and {answer_key!r}; it has {', '.join(sorted(row))}")
        problems.append(Problem(f"{benchmark.name}/{index}", str(row[problem_key]), _hub_answer(row[answer_key])))
    return problems


def _hub_answer(value: Any) -> str:
    """Lists of one answer, floats that are integers (27.0), and text."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_hub_answer(part) for part in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
