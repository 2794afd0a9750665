"""The row of Table 1 from answers: numbers against sums by hand, tables against the paper's layout."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import pytest

from lens_megatron.errors import RunError
from lens_megatron.evaluation import tables
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.benchmarks import BENCHMARKS
from lens_megatron.evaluation.results import (
    ModelResult,
    metric_names,
    model_result,
    results_tree,
    set_result,
    step_metrics,
)
from lens_megatron.evaluation.sets import EvalSet, fingerprint
from lens_megatron.types import Prompt


def a_set(name: str, samples: int, problems: int, size: int | None = None) -> EvalSet:
    title = BENCHMARKS[name].title if name in BENCHMARKS else name
    prompts = tuple(Prompt(f"{name}/{i}", (1, i), (0, 2), "4") for i in range(problems))
    return EvalSet(name, title, samples, problems if size is None else size, prompts)


def answer(one: EvalSet, problem: int, index: int, reward: float) -> Answer:
    prompt = one.prompts[problem]
    verdict = "correct" if reward == 1 else "partial" if reward else "wrong"
    finish = "length" if index == 0 and problem == 0 else "stop"
    return Answer(one.name, prompt.id, index, fingerprint(prompt), "text", 10 + index, finish, reward, verdict, "", "4")


def answered(one: EvalSet, rewards: list[list[float]]) -> dict:
    given = [answer(one, i, j, reward) for i, row in enumerate(rewards) for j, reward in enumerate(row)]
    random.Random(0).shuffle(given)  # they come in any order
    return {a.key: a for a in given}


def test_a_benchmark_by_hand() -> None:
    one = a_set("amc23", 4, 3)
    found = set_result(one, answered(one, [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0.5]]), 0.95)
    means = [0.5, 0.0, 0.75]
    centre = sum(means) / 3
    assert found.average == pytest.approx(centre)
    assert found.standard_error == pytest.approx(math.sqrt(sum((m - centre) ** 2 for m in means) / 2 / 3))
    # pass@2: 1 - C(2,2)/C(4,2), 0, 1 - C(1,2)/C(4,2); partly right is not right
    assert found.pass_at == pytest.approx({1: (0.5 + 0 + 0.75) / 3, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3})
    assert found.reward == pytest.approx((0.5 + 0 + 3.5 / 4) / 3)
    assert found.verdicts == {"correct": 5, "partial": 1, "wrong": 6}
    assert found.response_tokens == pytest.approx(11.5) and found.truncated == pytest.approx(1 / 12)
    assert (found.measure, found.whole) == ("Average@4", True)
    assert found.interval.low <= centre <= found.interval.high


def test_partial_credit_is_no_accuracy() -> None:
    """Accuracy, its errors and pass@k are of right answers; what the rewards were has a name of its own."""
    one, plain = a_set("held", 2, 3), a_set("plain", 2, 3)
    given = answered(one, [[0.2, 1], [0.5, 0.5], [0, 0.2]]) | answered(plain, [[0, 1], [0, 0], [0, 0]])
    graded, binary = (set_result(each, given, 0.95) for each in (one, plain))
    assert graded.average == graded.pass_at[1] == binary.average == pytest.approx(1 / 6)
    assert graded.reward == pytest.approx(2.4 / 6) and binary.reward == binary.average
    for name in ("standard_error", "sampling_error", "interval", "pass_at"):
        assert getattr(graded, name) == getattr(binary, name), name
    both, bare = ModelResult("m", None, (graded, binary)), ModelResult("m", None, (binary,))
    assert both.average == pytest.approx(1 / 6)
    head, rows = tables.detail_head(both), tables.detail_rows(both)
    assert [row[head.index("accuracy")] for row in rows] == ["16.67", "16.67"]
    assert [row[head.index("reward")] for row in rows] == ["40.00", "16.67"]
    assert "reward" not in tables.markdown_details(bare) and len(tables.detail_rows(bare)[0]) == len(head) - 1
    trees = results_tree([both], {})["models"][0]["benchmarks"]
    assert (trees["held"]["average"], trees["held"]["reward"]) == pytest.approx((1 / 6, 0.4))
    metrics, expected = step_metrics([one], given.values()), step_metrics([plain], given.values())
    assert metrics["eval/held"] == expected["eval/plain"]
    assert metrics["eval/held/standard_error"] == expected["eval/plain/standard_error"]
    assert (metrics["eval/held/reward"], expected["eval/plain/reward"]) == pytest.approx((0.4, 1 / 6))


def test_a_function_may_call_an_answer_right_whose_reward_is_not_whole() -> None:
    one = a_set("held", 1, 2)
    long, wrong = (replace(answer(one, problem, 0, 0.7), verdict=v) for problem, v in ((0, "correct"), (1, "partial")))
    found = set_result(one, {a.key: a for a in (long, wrong)}, 0.95)
    assert (found.average, found.pass_at, found.reward) == (0.5, {1: 0.5}, pytest.approx(0.7))


def test_one_sample_of_one_problem_says_nothing_of_errors() -> None:
    one = a_set("math500", 1, 1, 500)
    found = set_result(one, answered(one, [[1]]), 0.95)
    assert (found.standard_error, found.sampling_error, found.measure, found.whole) == (None, None, "Pass@1", False)
    tree = json.loads(json.dumps(results_tree([ModelResult("m", None, (found,))], {"seed": 0}), allow_nan=False))
    assert tree["models"][0]["benchmarks"]["math500"]["average"] == 1.0


def test_a_missing_answer_is_an_error_and_surplus_ones_are_not_counted() -> None:
    one = a_set("amc23", 2, 2)
    answers = answered(one, [[1, 0, 1], [0, 0, 1]])  # earlier, three were asked for
    assert set_result(one, answers, 0.95).average == 0.25
    del answers["amc23", "amc23/1", 1, fingerprint(one.prompts[1])]
    with pytest.raises(RunError, match="amc23/1, sample 1"):
        set_result(one, answers, 0.95)


SIZES = {"math500": (1, 500), "amc23": (16, 40), "aime24": (16, 30), "aime25": (16, 30), "gaokao2023en": (1, 385),
         "minerva_math": (1, 272), "olympiadbench": (1, 675)}  # fmt: skip
# Of the paper's Table 1, Qwen3-4B-Base: problems right of all, or responses of all samples.
BASE = {"math500": 361, "minerva_math": 74, "olympiadbench": 263, "gaokao2023en": 251, "amc23": 171, "aime24": 27,
        "aime25": 32}  # fmt: skip


def row(name: str, right: dict[str, int], step: int | None = None) -> ModelResult:
    sets = [a_set(benchmark, k, size) for benchmark, (k, size) in SIZES.items()]
    answers: dict = {}
    for one in sets:
        flat = [float(i < right[one.name]) for i in range(one.samples * one.size)]
        answers |= answered(one, [flat[i * one.samples : (i + 1) * one.samples] for i in range(one.size)])
    return model_result(name, step, sets, answers, 0.95)


def test_table_1_of_the_paper() -> None:
    """Its row of Qwen3-4B-Base, from as many right answers as it takes; AIME25 is off the grid of k/480 in print."""
    base = row("Qwen3-4B-Base", BASE)
    better = row("+ LENS_GRPO 100%", {**BASE, "math500": 416, "aime24": 27, "minerva_math": 10})
    assert tables.columns([base]) == ["MATH", "Minerva", "Olympiad", "GAO", "AMC23", "AIME24", "AIME25", "Avg."]
    assert tables.measures([base]) == [("Pass@1", 4), ("Average@16", 3)]
    assert tables.cells(base)[:6] == ["72.20", "27.21", "38.96", "65.19", "26.72", "5.62"]
    assert tables.cells(base)[7] == f"{sum(100 * one.average for one in base.sets) / 7:.2f}"
    markdown = tables.markdown_table([base, better])
    lines = markdown.splitlines()
    assert lines[0] == "| Model | Pass@1 |  |  |  | Average@16 |  |  |  |"
    assert lines[3].startswith("| Qwen3-4B-Base | <u>72.20</u> | **27.21** | **38.96** |")
    assert lines[4].startswith("| + LENS_GRPO 100% | **83.20** | <u>3.68</u> | **38.96** |")
    assert len({line.count("|") for line in lines}) == 1
    latex = tables.latex_table([base, better])
    assert r"\multicolumn{4}{c}{Pass@1} & \multicolumn{3}{c}{Average@16} & \multirow{2}{*}{Avg.} \\" in latex
    assert r"\cmidrule(lr){2-5}\cmidrule(lr){6-8}" in latex
    assert r"+ LENS\_GRPO 100\% & \textbf{83.20} & \underline{3.68}" in latex
    rows = [line for line in latex.splitlines() if " & " in line and "multi" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows} == {8}
    assert latex.count("{") == latex.count("}")


def test_some_benchmarks_and_parts_of_them() -> None:
    one = a_set("aime24", 16, 2, 30)
    result = model_result("m", None, [one], answered(one, [[1.0] * 16, [0.0] * 16]), 0.95)
    assert (tables.columns([result]), tables.cells(result)) == (["AIME24*"], ["50.00"])
    assert "2 of 30 problems" in tables.markdown_table([result]) and "2 of 30" in tables.latex_table([result])
    assert tables.detail_rows(result)[0][7] == "2: 50.0, 4: 50.0, 8: 50.0, 16: 50.0"


def test_metrics_of_a_step() -> None:
    one, two = a_set("math500", 1, 4), a_set("held", 2, 2)
    answers = [*answered(one, [[1], [0], [1], [1]]).values(), *answered(two, [[1, 0], [0, 0]]).values()]
    metrics = step_metrics([one, two], answers)
    assert (metrics["eval/math500"], metrics["eval/held"], metrics["eval/average"]) == (0.75, 0.25, 0.5)
    assert metrics["eval/math500/standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert set(metric_names([one, two])) <= set(metrics)
    errors = [math.sqrt(0.75 * 0.25 / 3), math.sqrt(0.25**2 + 0.25**2) / math.sqrt(2)]
    assert metrics["eval/held/standard_error"] == pytest.approx(errors[1])
    assert metrics["eval/average/standard_error"] == pytest.approx(math.hypot(*errors) / 2)
    assert "eval/average" not in step_metrics([one], answers)


def test_a_format_rule_does_not_reach_the_table() -> None:
    """Right without the format has reward 0.9, wrong with it 0.1."""
    one = a_set("held_out", 1, 2)
    right, wrong = (
        replace(answer(one, problem, 0, 0.0), reward=reward, verdict=verdict, answer_reward=own)
        for problem, reward, verdict, own in ((0, 0.9, "correct", 1.0), (1, 0.1, "wrong", 0.0))
    )
    found = set_result(one, {a.key: a for a in (right, wrong)}, 0.95)
    assert (found.average, found.pass_at) == (0.5, {1: 0.5})
    metrics = step_metrics([one], [right, wrong])
    assert metrics["eval/held_out"] == metrics["eval/held_out/reward"] == found.reward == 0.5
