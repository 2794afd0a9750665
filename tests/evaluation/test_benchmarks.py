"""The table of benchmarks, and their files where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_megatron.errors import UsageError
from lens_megatron.evaluation.benchmarks import (
    ALTERNATIVE,
    BENCHMARKS,
    RULE,
    Benchmark,
    Problem,
    load_benchmark,
    repair,
    select_benchmarks,
)
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request
from tests.evaluation.data_folder import benchmark_folder

TINY = Benchmark("tiny", "Tiny", 3, 1, "owner/tiny", "test", ("problem", "answer"))


def _write(folder: Path, rows: list[dict[str, str]], name: str = "tiny.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(count: int) -> list[dict[str, str]]:
    return [{"id": f"tiny/{i}", "problem": f"What is {i}?", "answer": str(i)} for i in range(count)]


def test_the_table_is_the_papers() -> None:
    sizes = {name: (benchmark.size, benchmark.samples) for name, benchmark in BENCHMARKS.items()}
    assert sizes == {
        "math500": (500, 1),
        "minerva_math": (272, 1),
        "olympiadbench": (675, 1),
        "gaokao2023en": (385, 1),
        "amc23": (40, 16),
        "aime24": (30, 16),
        "aime25": (30, 16),
    }


def test_names_are_chosen_in_order() -> None:
    assert select_benchmarks("all") == list(BENCHMARKS.values())
    assert [b.name for b in select_benchmarks("aime25, math500,minerva,math500")] == [
        "aime25",
        "math500",
        "minerva_math",
    ]
    with pytest.raises(UsageError, match="not one of all, math500"):
        select_benchmarks("math5000")
    with pytest.raises(UsageError, match="give all"):
        select_benchmarks(" , ")


def test_corrected_rows_replace_the_ones_with_their_id(tmp_path: Path) -> None:
    rows = _rows(3)
    rows[1]["answer"] = ""
    _write(tmp_path, rows)
    with pytest.raises(UsageError, match="no answer for tiny/1"):
        load_benchmark(TINY, tmp_path)
    fixed = [{"id": "tiny/1", "problem": "What is one?", "answer": "1"}]
    (tmp_path / "tiny_fixes.json").write_text(json.dumps(fixed))
    loaded = load_benchmark(TINY, tmp_path)
    assert [p.answer for p in loaded] == ["0", "1", "2"]
    assert loaded[1].problem == "What is one?"
    fixed[0]["id"] = "tiny/9"
    (tmp_path / "tiny_fixes.json").write_text(json.dumps(fixed))
    with pytest.raises(UsageError, match="no problem 'tiny/9'"):
        load_benchmark(TINY, tmp_path)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tiny\.jsonl: No such file"):
        load_benchmark(TINY, tmp_path)
    _write(tmp_path, _rows(2))
    with pytest.raises(UsageError, match="2 problems, expected 3"):
        load_benchmark(TINY, tmp_path)
    _write(tmp_path, [*_rows(2), _rows(1)[0]])
    with pytest.raises(UsageError, match="same id"):
        load_benchmark(TINY, tmp_path)
    _write(tmp_path, [{"id": "a", "question": "b", "answer": "c"}])
    with pytest.raises(UsageError, match=r"tiny\.jsonl:1: expected"):
        load_benchmark(TINY, tmp_path)


def test_a_question_for_a_percentage_takes_the_sign_or_leaves_it() -> None:
    def answer(question: str, gold: str) -> str:
        return repair("math500", Problem("x", question, gold)).answer

    assert answer("What percent of the cars is red?", "75") == "75" + ALTERNATIVE + "75\\%"
    assert answer("What percent of the cars is red?", r"75\%") == r"75\%"
    assert answer("A tin has 40 calories, 2\\% of the daily need. What is the need?", "2000") == "2000"
    assert answer("Give a fraction, not as a percent.", r"\frac{5}{8}") == r"\frac{5}{8}"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(workers=2, default=RULE)) as made:
        yield made


def _wrapped(answer: str) -> str:
    """As a model would give it. Outside a box a dollar sign begins mathematics; escaped ones are money."""
    answer = answer.split(ALTERNATIVE)[0].replace(r"\$", "\x00").replace("$", "").replace("\x00", r"\$")
    return (
        f"We work it out step by step.\n\nTherefore, the final answer is $\\boxed{{{answer}}}$. I hope it is correct."
    )


def _respelt(answer: str) -> str:
    """The same mathematics, as another model writes it."""
    for ours, theirs in ((r"\frac", r"\dfrac"), ("(", r"\left("), (")", r"\right)"), (",", ", "), ("=", " = "),
    (r"\sqrt", r" \sqrt"), (r"\text{", r"\textbf{")):  # fmt: skip
        answer = answer.replace(ours, theirs) if r"\left" not in answer or ours not in "()" else answer
    return answer


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_golden_answers_score_100_percent(pool: RewardPool, name: str) -> None:
    problems = load_benchmark(BENCHMARKS[name], benchmark_folder())
    judged = pool.grade_all(Request(p.id, name, p.answer, _wrapped(p.answer)) for p in problems)
    assert [(p.id, p.answer) for p, j in zip(problems, judged, strict=True) if j.reward != 1] == []


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_golden_answers_in_another_spelling(pool: RewardPool, name: str) -> None:
    problems = load_benchmark(BENCHMARKS[name], benchmark_folder())
    judged = pool.grade_all(Request(p.id, name, p.answer, _wrapped(_respelt(p.answer))) for p in problems)
    refused = [p.answer for p, j in zip(problems, judged, strict=True) if j.reward != 1]
    assert len(refused) <= 0.01 * len(problems), refused


@pytest.mark.parametrize("name", ["math500", "minerva_math", "olympiadbench", "gaokao2023en"])
def test_answers_of_other_problems_score_next_to_nothing(pool: RewardPool, name: str) -> None:
    problems = load_benchmark(BENCHMARKS[name], benchmark_folder())
    answers = [p.answer for p in problems]
    for shift in (1, 17):
        others = answers[shift:] + answers[:shift]
        judged = pool.grade_all(
            Request("x", name, gold, _wrapped(other)) for gold, other in zip(answers, others, strict=True)
        )
        believed = [(g, o) for g, o, j in zip(answers, others, judged, strict=True) if j.reward > 0]
        assert len(believed) <= 0.04 * len(problems)
        # what coincides does so to the letter, but for a few: $x=5$ for 5
        spelt_otherwise = [(g, o) for g, o in believed if g.strip("$ ") != o.strip("$ ")]
        assert len(spelt_otherwise) <= 2, spelt_otherwise
