"""One response judged by one rule. Runs in a reward worker; only `mathematics` of the shipped kinds parses anything."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from lens_megatron.rewards.config import RewardRule
from lens_megatron.rewards.extract import MAX_ANSWER_CHARS, final_answer, golden_answer, has_control_characters
from lens_megatron.rewards.judgement import Judgement, verdict_of
from lens_megatron.rewards.latex import clean
from lens_megatron.rewards.mathematics import Comparison, compare, share_found
from lens_megatron.rewards.numbers import read_number, same_number
from lens_megatron.rewards.units import split_unit

SHOWN_CHARS = 200

_FORMATS = {
    "boxed": r"\\boxed\s*\{[^{}]*\S",
    "think": r"\A\s*<think>(?:(?!</?think>)[\s\S])+</think>(?:(?!</?think>)[\s\S])*\S",
}


def judge(rule: RewardRule, answer: str, response: str, cut: bool = False) -> Judgement:
    """By a shipped kind. Custom kinds are custom.py's. `cut`: the response ran into the length limit."""
    judged = _answer_judged(rule, answer, response, cut)
    return with_format(rule, response, judged)


def with_format(rule: RewardRule, response: str, judged: Judgement) -> Judgement:
    """The verdict stays the answer's own; the reward is what the format changes."""
    if rule.format is None:
        return judged
    pattern = _FORMATS.get(rule.format.pattern, rule.format.pattern)
    has_it = not has_control_characters(response) and re.search(pattern, response) is not None
    reward = (1 - rule.format.weight) * judged.reward + rule.format.weight * has_it
    return replace(judged, reward=reward, answer_reward=judged.reward)


def _answer_judged(rule: RewardRule, answer: str, response: str, cut: bool) -> Judgement:
    if has_control_characters(response):
        return Judgement(0.0, "unparsable", "control characters")
    given = final_answer(response, rule.answer_in, cut)
    if not given:
        return Judgement(0.0, "unparsable", "no answer")
    if len(given) > MAX_ANSWER_CHARS:
        return Judgement(0.0, "unparsable", "too long")
    golds = answer.split(rule.alternatives) if rule.alternatives else [answer]
    best = Judgement(0.0, "unparsable", "not understood")
    for gold in golds:
        judged = _judged_against(rule, gold.strip(), given)
        if judged.reward > best.reward or (best.verdict == "unparsable" and judged.verdict != "unparsable"):
            best = judged
        if best.reward >= 1:
            break
    return Judgement(best.reward, best.verdict, best.note, given[:SHOWN_CHARS])


def _judged_against(rule: RewardRule, gold: str, given: str) -> Judgement:
    if rule.kind == "exact":
        return _decided(" ".join(gold.split()) == " ".join(given.split()))
    gold = golden_answer(gold)
    if rule.kind == "choice":
        return _choice(gold, given)
    if rule.kind == "numeric":
        return _numeric(rule, gold, given)
    return _mathematics(rule, gold, given)


def _decided(same: bool) -> Judgement:
    return Judgement(float(same), verdict_of(float(same)))


def _choice(gold: str, given: str) -> Judgement:
    letter = re.compile(
        r"(?:option|choice|answer)?\s*[(\[]?\s*([A-Za-z])\s*[)\].:]?(?=$|\s*[^A-Za-z\s])", re.IGNORECASE
    )
    wanted, offered = (letter.match(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", clean(text))) for text in (gold, given))
    if offered is None:
        return Judgement(0.0, "unparsable", "not understood")
    others = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", given)
    return _decided(wanted is not None and wanted[1].upper() == offered[1].upper() and len(set(others)) <= 1)


def _numeric(rule: RewardRule, gold: str, given: str) -> Judgement:
    numbers = [read_number(clean(text)) or read_number(split_unit(clean(text))[0]) for text in (gold, given)]
    wanted, offered = numbers
    if offered is None:
        return Judgement(0.0, "unparsable", "not understood")
    return _decided(wanted is not None and same_number(wanted, offered, rule.tolerance))


def _mathematics(rule: RewardRule, gold: str, given: str) -> Judgement:
    how = Comparison(rule.tolerance, rule.percent, _same_expression, _near)
    outcome = compare(gold, given, how)
    if outcome == "same":
        return Judgement(1.0, "correct")
    if rule.partial:
        share = share_found(gold, given, how)
        return Judgement(share, verdict_of(share))
    return Judgement(0.0, "wrong") if outcome == "different" else Judgement(0.0, "unparsable", "not understood")


def _same_expression(gold: str, given: str) -> bool | None:
    from lens_megatron.rewards.expressions import same_expression  # a second to import: not for plain numbers

    return same_expression(gold, given)


def _near(expression: str, number: Fraction, step: Fraction) -> bool:
    from lens_megatron.rewards.expressions import near

    return near(expression, number, step)
