"""Can a data set's answers be given at all? Where none can, every reward is 0, and training goes on teaching nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from lens_megatron.errors import UsageError
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.custom import missing
from lens_megatron.rewards.extract import golden_answer, words_outside_formulas
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request, environment

LOOKED_AT = 64  # answers of each source, evenly spread over it: seconds, and two minutes where all are slow to judge
_IMPORT_SECONDS = 60.0
_ENOUGH = 8  # to say of a source that none can
_MOST_WORDS = 12  # of an answer, beside its formulas
_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")


class Question(Protocol):
    """A prompt, or a row that is to become one."""

    @property
    def id(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def source(self) -> str: ...


def check_functions(
    config: RewardConfig, python: str = sys.executable, variables: Mapping[str, str] | None = None
) -> None:
    """UsageError for a function of the user's that is not there, before anything is loaded. Imported in a process of its own,
    as its workers will be: the module may do anything. `python`, `variables`: of a run that starts elsewhere, which finds
    functions by its own environment."""
    rules = [rule for rule in (config.default, *config.sources.values()) if rule is not None]
    names = sorted({str(rule.function) for rule in rules if rule.kind == "function"})
    if not names:
        return
    code = f"import sys; from {missing.__module__} import missing; sys.exit(missing(sys.argv[1:]) or 0)"
    command = [python, "-c", code, *names]
    there = {**os.environ, **(environment(custom=True) if variables is None else variables)}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, env=there)
    except subprocess.TimeoutExpired:
        return  # it may take its time: its workers will tell
    lines = found.stderr.strip().splitlines()
    if found.returncode == 1 and lines:
        raise UsageError(f"rewards: {lines[-1]}")


def check_answers(prompts: Sequence[Question], config: RewardConfig, data: str) -> str:
    """Each golden answer, given as a response, judged by its own rule: a note for people, "" when all are
    right. UsageError for a source without a rule, or none of whose answers is right. Functions and servers of one's own are
    not asked."""
    by_source: dict[str, list[Question]] = defaultdict(list)
    for prompt in prompts:
        by_source[prompt.source].append(prompt)
    looked_at: list[Question] = []
    for source, mine in by_source.items():
        rule = config.rule(source)
        if rule is None:
            known = ", ".join(config.sources) or "none"
            raise UsageError(f"{data}: no reward for source {source!r} ({mine[0].id}): rewards.sources has {known}")
        if not rule.custom:
            looked_at += mine[:: -(-len(mine) // LOOKED_AT)]
    unusual = [prompt for prompt in looked_at if not _obvious(prompt, config)]
    if not unusual:
        return ""
    with RewardPool(replace(config, workers=min(2, config.processes))) as pool:
        asked = [(prompt, form) for prompt in unusual for form in _given(prompt, config)]
        judged = pool.grade_all(form for _, form in asked)
    right = {prompt.id for (prompt, _), judgement in zip(asked, judged, strict=True) if judgement.verdict == "correct"}
    wrong = [prompt for prompt in unusual if prompt.id not in right or _whole_solution(prompt, config)]
    if not wrong:
        return ""
    for source in {prompt.source for prompt in wrong}:
        here = [prompt for prompt in looked_at if prompt.source == source]
        lost = [prompt for prompt in wrong if prompt.source == source]
        if len(lost) == len(here) >= _ENOUGH:
            raise UsageError(
                f"{data}: no response could be right: none of {len(here)} answers of source {source!r} is itself, by the "
                f"source's rule (rewards), such as {_shown(lost[0])}: see data.answer_key, and the rule"
            )
    return (
        f"{len(wrong)} of {len(looked_at)} golden answers that were looked at are not right themselves by their rule, "
        f"such as {_shown(wrong[0])}"
    )


def _first(prompt: Question, config: RewardConfig) -> str:
    """Of several acceptable answers."""
    rule = config.rule(prompt.source)
    return prompt.answer.split(rule.alternatives)[0] if rule and rule.alternatives else prompt.answer


def _given(prompt: Question, config: RewardConfig) -> list[Request]:
    """As a model might give it."""
    answer = golden_answer(_first(prompt, config)).strip()
    forms = [rf"\boxed{{{answer}}}", f"The answer is {answer}"]
    if (rule := config.rule(prompt.source)) and rule.kind == "choice" and (letter := _LETTER.search(answer)):
        forms.append(rf"\boxed{{{letter[0]}}}")
    return [Request(prompt.id, prompt.source, prompt.answer, form) for form in forms]


def _whole_solution(prompt: Question, config: RewardConfig) -> bool:
    """Text equals itself, but nobody will answer with so much of it."""
    rule = config.rule(prompt.source)
    words = words_outside_formulas(golden_answer(_first(prompt, config)))
    return rule is not None and rule.kind in ("math", "numeric") and words > _MOST_WORDS


def _obvious(prompt: Question, config: RewardConfig) -> bool:
    """Not worth the second that it takes to start a judge."""
    rule = config.rule(prompt.source)
    return rule is not None and rule.kind != "choice" and _PLAIN_NUMBER.fullmatch(prompt.answer) is not None


def _shown(prompt: Question) -> str:
    answer = prompt.answer if len(prompt.answer) <= 60 else f"{prompt.answer[:57]}..."
    return f"{prompt.id}: {answer!r}"
