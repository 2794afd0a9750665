"""Answers in a file are judged by the rules of today, without being generated again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lens_megatron.evaluation.answer_file import AnswerFile
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.config import GenerationConfig
from lens_megatron.evaluation.kept_answers import Answering, answers_to
from lens_megatron.evaluation.sets import EvalSet, Question, questions
from lens_megatron.rewards.config import FormatRule, RewardConfig, RewardRule
from lens_megatron.rewards.rules_id import rules_id
from lens_megatron.types import Prompt

PROMPTS = tuple(Prompt(f"p{i}", (5, i), (0, 2), str(i), "held_out") for i in range(3))
WANTED = questions([EvalSet("held_out", "Held out", 1, 3, PROMPTS)], 0)
REWARDS = RewardConfig(workers=1)


def asked_of_nobody(rewards: RewardConfig) -> Answering:
    """Fails where anything would be generated: there is no model."""
    nothing: Any = None
    return Answering(nothing, nothing, GenerationConfig(), rewards, nothing)


def kept(question: Question, response: str, rules: str) -> Answer:
    one, prompt, index, fingerprint = question.key
    return Answer(one, prompt, index, fingerprint, response, 3, "stop", 0.25, "partial", "", "?", rules)


def test_only_answers_judged_by_other_rules_are_judged_again(tmp_path: Path) -> None:
    today = rules_id(REWARDS, "held_out")
    with AnswerFile(tmp_path / "a.jsonl", {}) as file:
        for question, response, rules in zip(WANTED, ("the answer is 0", "7", "2"), ("", "older", today), strict=True):
            file.append(kept(question, response, rules))
        before = dict(file.answers)
        now = answers_to(WANTED, file, asked_of_nobody(REWARDS), "a model")
        first, second, third = (now[question.key] for question in WANTED)
    assert first == replace(before[first.key], reward=1.0, verdict="correct", extracted="0", rules=today)
    assert (second.reward, second.verdict, second.response) == (0.0, "wrong", "7")
    assert third == before[third.key]  # whatever is written there
    size = (tmp_path / "a.jsonl").stat().st_size
    with AnswerFile(tmp_path / "a.jsonl", {}) as file:  # the later lines count, and there is nothing left to do
        assert answers_to(WANTED, file, asked_of_nobody(REWARDS), "a model") == now
    assert (tmp_path / "a.jsonl").stat().st_size == size


def test_what_tells_rules_apart() -> None:
    strict = RewardRule()
    configs = [
        RewardConfig(default=None, sources={"a/*": rule})
        for rule in (strict, RewardRule(percent="lenient"), RewardRule(format=FormatRule()), RewardRule(kind="exact"))
    ]
    assert len({rules_id(config, "a/b") for config in configs}) == 4
    assert rules_id(RewardConfig(workers=3, sources={"other": RewardRule(kind="exact")}), "a/b") == rules_id(
        configs[0], "a/b"
    )
    assert rules_id(configs[0], "unknown") == ""
