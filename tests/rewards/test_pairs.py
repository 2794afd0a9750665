"""The hand-written suite, judged as a user's data would be."""

from __future__ import annotations

from collections import Counter

import pytest

from lens_megatron.rewards.config import FormatRule, RewardRule
from lens_megatron.rewards.judge import judge
from lens_megatron.rewards.judgement import verdict_of
from tests.rewards.pairs import FALSE_NEGATIVES, PAIRS

KINDS = sorted({kind for kind, *_ in PAIRS})


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_judged_as_a_teacher_would(kind: str) -> None:
    rule = RewardRule()
    mistaken = [
        (gold, response, judged.verdict)
        for pair_kind, gold, response, right in PAIRS
        if pair_kind == kind
        for judged in [judge(rule, gold, response)]
        if (judged.verdict == "correct") != right or judged.reward != float(right)
    ]
    assert not mistaken


def test_the_suite_is_large_and_has_as_many_traps_as_truths() -> None:
    wrong = sum(not right for *_, right in PAIRS)
    assert len(PAIRS) >= 150
    assert wrong >= 100 and len(PAIRS) - wrong >= 100
    assert min(Counter(kind for kind, *_ in PAIRS).values()) >= 6


@pytest.mark.parametrize(("kind", "gold", "response"), FALSE_NEGATIVES)
def test_what_the_grader_is_known_to_refuse(kind: str, gold: str, response: str) -> None:
    """A pair that is judged right by now belongs in PAIRS, where it stays right."""
    assert judge(RewardRule(), gold, response).reward == 0


def test_boxed_only_reads_nothing_else() -> None:
    rule = RewardRule(answer_in="boxed")
    assert judge(rule, "5", "The answer is 5.").note == "no answer"
    assert judge(rule, "5", r"\boxed{5}").verdict == "correct"


@pytest.mark.parametrize(
    ("response", "right_when_cut"),
    [
        ("Adding them:\nso 5 + 7 = 12", False),  # an intermediate result may be the last line
        ("The answer is 12", False),  # of 125
        ("12", False),
        ("The answer is 12.\nLet me check: 3 * 4", True),
        ("**Final answer**\n\n12\nbecause", True),
        ("**Final answer**\n\n12", False),
        (r"\boxed{12} and so", True),
    ],
)
def test_what_stands_where_a_response_was_cut_is_no_answer(response: str, right_when_cut: bool) -> None:
    assert judge(RewardRule(), "12", response).reward == 1
    assert judge(RewardRule(), "12", response, cut=True).reward == right_when_cut


def test_percent_lenient_overlooks_a_sign_that_the_gold_lacks() -> None:
    assert judge(RewardRule(percent="lenient"), "50", r"\boxed{50\%}").verdict == "correct"
    assert judge(RewardRule(percent="lenient"), "50", r"\boxed{5\%}").verdict == "wrong"


def test_tolerance_is_relative() -> None:
    rule = RewardRule(kind="numeric", tolerance=0.02)
    assert judge(rule, "1.60", r"\boxed{1.63}").verdict == "correct"
    assert judge(rule, "1.60", r"\boxed{1.64}").verdict == "wrong"
    assert judge(rule, "1.60", r"\boxed{1.62 \text{ cm}}").verdict == "correct"
    assert judge(rule, "1.60", r"\boxed{x}").verdict == "unparsable"
    assert judge(RewardRule(tolerance=0.02), r"\pi", r"\boxed{3.1}").verdict == "correct"
    assert judge(RewardRule(tolerance=0.01), r"\pi", r"\boxed{3.1}").verdict == "wrong"


def test_exact_compares_text() -> None:
    rule = RewardRule(kind="exact")
    assert judge(rule, "a  b", r"\boxed{a b}").verdict == "correct"
    assert judge(rule, "0.5", r"\boxed{.5}").verdict == "wrong"


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (r"\boxed{B}", "correct"),
        ("Answer: b", "correct"),
        (r"\boxed{\text{(B)}}", "correct"),
        ("The answer is (B) 12.", "correct"),
        (r"\boxed{C}", "wrong"),
        (r"\boxed{B, C}", "wrong"),
        (r"\boxed{Bus}", "unparsable"),
        ("no idea", "unparsable"),
    ],
)
def test_choice(response: str, verdict: str) -> None:
    assert judge(RewardRule(kind="choice"), "B", response).verdict == verdict


def test_several_answers_give_the_share_found() -> None:
    rule = RewardRule(partial=True)
    assert judge(rule, "1,2,3,4", r"\boxed{4,3,2,1}").reward == 1
    half = judge(rule, "1,2,3,4", r"\boxed{1,4}")
    assert (half.reward, half.verdict) == (0.5, "partial")
    assert judge(rule, "1,2,3,4", r"\boxed{1,2,3,5}").reward == pytest.approx(0.5)  # three found, one wrong
    assert judge(rule, "1,2,3,4", r"\boxed{1,5}").reward == 0
    assert judge(rule, "1,2", r"\boxed{1,2,3,4,5,6,7,8,9}").reward == 0


def test_any_of_the_alternatives_will_do() -> None:
    rule = RewardRule(alternatives="|||")
    for response, right in ((r"\boxed{4}", True), (r"\boxed{\frac12}", True), (r"\boxed{5}", False)):
        assert (judge(rule, r"4 ||| \frac{1}{2}", response).verdict == "correct") is right


def test_a_whole_reward_is_correct_though_its_parts_do_not_quite_add_up() -> None:
    assert 0.7 + 0.2 + 0.1 < 1
    assert [verdict_of(reward) for reward in (1.0, 0.7 + 0.2 + 0.1, 0.999, 0.001, 0.0)] == [
        "correct", "correct", "partial", "partial", "wrong",
    ]  # fmt: skip


def test_format_moves_the_reward_and_not_the_verdict() -> None:
    rule = RewardRule(format=FormatRule(pattern="think", weight=0.25))
    good, bad = "<think>well</think> \\boxed{5}", "\\boxed{5}"
    assert judge(rule, "5", good).reward == 1
    assert (judge(rule, "5", bad).reward, judge(rule, "5", bad).verdict) == (0.75, "correct")
    assert judge(rule, "6", good).reward == 0.25
    assert judge(rule, "6", "<think></think> \\boxed{5}").reward == 0


@pytest.mark.parametrize("response", ["no idea", "I do not know.", r"\boxed{\text{none}}", "", r"\boxed{"])
def test_no_answer_is_unparsable_and_not_wrong(response: str) -> None:
    assert judge(RewardRule(), "5", response).verdict == "unparsable"
