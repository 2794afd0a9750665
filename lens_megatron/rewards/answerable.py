"""Can a data set's answers be given at all? Where none can, every reward is 0, and training goes on teaching nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lens_megatron.errors import UsageError
from lens_megatron.rewards.config import RewardConfig, RewardRule
from lens_megatron.rewards.extract import golden_answer
from lens_megatron.rewards.pool import RewardPool
from lens_megatron.rewards.worker_process import Request
from lens_megatron.types import Prompt

LOOKED_AT = 256  # answers of each source, evenly spread over it: seconds, not minutes
_ENOUGH = 8  # to say of a source that none can
_LONGEST = 300  # characters of an answer
_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?")


def check_answers(prompts: Sequence[Prompt], config: RewardConfig, data: str) -> str:
    """Each golden answer in a box, judged by its own rule: a note for people, "" when all are right. UsageError for a source
    without a rule, or none of whose answers is right. Functions and servers of one's own are not asked."""
    by_source: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_source[prompt.source].append(prompt)
    requests = []
    for source, mine in by_source.items():
        rule = config.rule(source)
        if rule is None:
            known = ", ".join(config.sources) or "none"
            raise UsageError(f"{data}: no reward for source {source!r} ({mine[0].id}): rewards.sources has {known}")
        if not rule.custom:
            requests += [_itself(prompt, rule) for prompt in mine[:: -(-len(mine) // LOOKED_AT)]]
    unusual = [request for request in requests if not _obvious(request, config.rule(request.source))]
    if not unusual:
        return ""
    with RewardPool(replace(config, workers=min(2, config.processes))) as pool:
        judged = pool.grade_all(unusual)
    wrong = [
        request
        for request, judgement in zip(unusual, judged, strict=True)
        if judgement.verdict != "correct" or _whole_solution(request, config.rule(request.source))
    ]
    if not wrong:
        return ""
    for source in {request.source for request in wrong}:
        here = [request for request in requests if request.source == source]
        lost = [request for request in wrong if request.source == source]
        if len(lost) == len(here) >= _ENOUGH:
            raise UsageError(
                f"{data}: no response could be right: none of {len(here)} answers of source {source!r} is, in a box, by the "
                f"source's rule (rewards), such as {_shown(lost[0])}: see data.answer_key, and the rule"
            )
    return (
        f"{len(wrong)} of {len(requests)} golden answers that were looked at are not right themselves, in a box, by "
        f"their rule, such as {_shown(wrong[0])}"
    )


def _itself(prompt: Prompt, rule: RewardRule) -> Request:
    first = prompt.answer.split(rule.alternatives)[0] if rule.alternatives else prompt.answer
    return Request(prompt.id, prompt.source, prompt.answer, rf"\boxed{{{golden_answer(first).strip()}}}")


def _whole_solution(request: Request, rule: RewardRule | None) -> bool:
    """Text equals itself, but nobody will answer with it."""
    golden = golden_answer(request.answer)
    return rule is not None and rule.kind != "exact" and ("\n" in golden.strip() or len(golden) > _LONGEST)


def _obvious(request: Request, rule: RewardRule | None) -> bool:
    """Not worth the second that it takes to start a judge."""
    return rule is not None and rule.kind != "choice" and _PLAIN_NUMBER.fullmatch(request.answer) is not None


def _shown(request: Request) -> str:
    answer = request.answer if len(request.answer) <= 60 else f"{request.answer[:57]}..."
    return f"{request.id}: {answer!r}"
