"""Answers: every question once, nothing twice after a kill, and never those of another evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lens_megatron.errors import RunError, UsageError
from lens_megatron.evaluation.answer_file import AnswerFile
from lens_megatron.evaluation.answering import Answer, Limits, answer_all
from lens_megatron.evaluation.sets import EvalSet, Question, questions
from lens_megatron.types import Prompt
from tests.evaluation.scripted_engine import ScriptedEngine, judged_by

LIMITS = Limits(max_tokens=3, positions=100, stop_tokens=(1,))
PROMPTS = tuple(Prompt(f"p{i}", (5, 6, i), (0, 3), str(i), "s", f"question {i}") for i in range(5))
SETS = [EvalSet("one", "One", 3, 5, PROMPTS), EvalSet("two", "Two", 1, 2, PROMPTS[:2])]
JUDGE = judged_by(lambda prompt, response: float(sum(response) % 2))


def run(engine: ScriptedEngine, wanted: list[Question], limits: Limits = LIMITS) -> dict[tuple, Answer]:
    found: dict[tuple, Answer] = {}

    def keep(question: Question, answer: Answer) -> None:
        assert question.key == answer.key and answer.key not in found
        found[answer.key] = answer

    answer_all(engine, JUDGE, wanted, limits, keep)
    return found


def test_every_question_is_answered_once_within_the_slots() -> None:
    engine, wanted = ScriptedEngine(slots=4), questions(SETS, 0)
    found = run(engine, wanted)
    assert len(wanted) == 5 * 3 + 2 and set(found) == {question.key for question in wanted}
    assert engine.most <= 4 and len(engine.asked) == 17
    assert len({request.seed for request in engine.asked}) == 17
    assert all(request.stop == (1,) and request.temperature == 1.0 for request in engine.asked)


def test_seeds_depend_on_run_and_step_and_answers_on_nothing_else() -> None:
    wanted = questions(SETS, 0, 20)
    assert run(ScriptedEngine(slots=1), wanted) == run(ScriptedEngine(slots=9), list(reversed(wanted)))
    seeds = [[question.seed for question in questions(SETS, *seeds)] for seeds in ((0, 20), (0, 21), (1, 20))]
    assert seeds[0] == [question.seed for question in wanted]
    assert not set(seeds[0]) & set(seeds[1]) and not set(seeds[0]) & set(seeds[2])


def test_a_killed_evaluation_generates_nothing_twice_and_comes_to_the_same(tmp_path: Path) -> None:
    wanted = questions(SETS, 0)
    path, made_by = tmp_path / "answers" / "m.jsonl", {"weights": "abc", "seed": 0}
    asked: list[int] = []
    for dies_after in (0, 4, 7, None):
        engine = ScriptedEngine(slots=3, dies_after=dies_after)
        with AnswerFile(path, made_by) as file:
            before = set(file.answers)
            missing = [question for question in wanted if question.key not in before]
            try:
                answer_all(engine, JUDGE, missing, LIMITS, lambda _, answer, file=file: file.append(answer))
            except KeyboardInterrupt:
                assert dies_after is not None
            finished = {answer.key for answer in file.answers.values()} - before
            assert len(finished) == engine.done
        asked.append(engine.done)
        with path.open("ab") as raw:  # killed while it wrote the next line
            raw.write(b'{"set": "one", "id"')
    assert asked == [0, 4, 7, 6]
    with AnswerFile(path, made_by) as file:
        assert file.answers == run(ScriptedEngine(), wanted)
    assert b'"id"\n' not in path.read_bytes()


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with AnswerFile(path, {"weights": "abc", "temperature": 1.0}):
        pass
    with pytest.raises(UsageError, match=r"another evaluation \(temperature was 1.0, is 0.6\)"):
        AnswerFile(path, {"weights": "abc", "temperature": 0.6})
    path.write_text(path.read_text() + '{"set": 1}\n')
    with pytest.raises(UsageError, match=r"m.jsonl:2: not an answer"):
        AnswerFile(path, {"weights": "abc", "temperature": 1.0})
    path.write_text("no json\n")
    with pytest.raises(UsageError, match=r"m.jsonl:1: not JSON"):
        AnswerFile(path, {})
    (tmp_path / "f").write_text(json.dumps({"rows": 1}) + "\n")
    with pytest.raises(UsageError, match="no first line that says which"):
        AnswerFile(tmp_path / "f", {})


def test_changed_problems_are_asked_again(tmp_path: Path) -> None:
    wanted = questions(SETS[:1], 0)
    corrected = replace(SETS[0], prompts=(replace(PROMPTS[0], answer="corrected"), *PROMPTS[1:]))
    kept = {question.key for question in wanted} & {question.key for question in questions([corrected], 0)}
    assert len(kept) == 12  # the three samples of the corrected problem are new


def test_responses_end_where_the_model_does() -> None:
    long = Prompt("long", tuple(range(99)), (0, 99), "1")
    too_long = Prompt("too long", tuple(range(100)), (0, 100), "1")
    engine = ScriptedEngine()
    found = run(engine, questions([EvalSet("s", "S", 1, 2, (long, too_long))], 0))
    assert [request.max_tokens for request in engine.asked] == [1]
    answers = {answer.id: answer for answer in found.values()}
    assert (answers["too long"].tokens, answers["too long"].finish) == (0, "length")


def test_aborted_responses_are_asked_again_but_not_for_ever() -> None:
    wanted = questions(SETS[1:], 0)
    engine = ScriptedEngine(slots=1, aborts=3)
    assert run(engine, wanted) == run(ScriptedEngine(), wanted)
    assert len({request.id for request in engine.asked}) == len(engine.asked) == 5
    with pytest.raises(RunError, match="aborted a response 4 times"):
        run(ScriptedEngine(slots=1, aborts=99), wanted)


def test_an_error_leaves_the_engine_idle() -> None:
    engine = ScriptedEngine(slots=4)

    def broken(question: Question, answer: Answer) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        answer_all(engine, JUDGE, questions(SETS, 0), LIMITS, broken)
    assert engine.running == []
