"""Data whose answers nobody can give is found before a model is loaded."""

from __future__ import annotations

import pytest

from lens_megatron.errors import UsageError
from lens_megatron.rewards import answerable
from lens_megatron.rewards.answerable import check_answers
from lens_megatron.rewards.config import FormatRule, RewardConfig, RewardRule
from lens_megatron.rewards.judge import judge
from lens_megatron.types import Prompt

MATH = RewardConfig(workers=1)


def prompts(answers: list[str], source: str = "s") -> list[Prompt]:
    return [Prompt(f"{source}/{i}", (1,), (0, 1), answer, source) for i, answer in enumerate(answers)]


def test_answers_that_can_be_given() -> None:
    """Also as whole solutions: GSM8K's own column, and MATH's."""
    answers = [
        "12",
        "-0.5",
        r"\frac{1}{2}",
        "(1, 2]",
        "Half of 10 is <<10/2=5>>5.\n#### 5",
        r"So $x=\boxed{\sqrt{2}}$.",
    ]
    assert check_answers(prompts(answers), MATH, "data") == ""


def test_numbers_need_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answerable, "RewardPool", None)
    assert check_answers(prompts(["1", "22.5", "-3"]), MATH, "data") == ""
    with pytest.raises(TypeError):
        check_answers(prompts(["1"]), RewardConfig(default=RewardRule(kind="choice")), "data")


def test_some_are_told_and_a_source_without_any_is_refused() -> None:
    words = ["The proof is left to the reader.\nWho may like to try it in the evening."] * 7 + ["\x00"]
    note = check_answers([*prompts(["3"]), *prompts(words)], MATH, "data")
    assert note.startswith("8 of 9 golden answers") and "s/0: 'The proof" in note
    with pytest.raises(UsageError, match=r"^data: no response could be right: none of 8 answers of source 't' is"):
        check_answers([*prompts(["3"] * 9), *prompts(words, "t")], MATH, "data")


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        (RewardRule(alternatives="\n"), "7\n14/2"),
        (RewardRule(alternatives="|||"), "|||".join(["an isosceles triangle", "isosceles", "two equal sides"] * 9)),
        (RewardRule(), "\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}"),
        (RewardRule(kind="choice"), "D. The C major scale"),
        (RewardRule(kind="exact"), "}"),
        (RewardRule(kind="exact"), "a long text that is to be given word for word, however many words there are in it"),
        (RewardRule(answer_in="boxed"), r"\sqrt{2}"),
        (RewardRule(format=FormatRule(weight=0.5)), r"\pi"),
    ],
)
def test_unusual_answers_are_not_refused(rule: RewardRule, answer: str) -> None:
    assert check_answers(prompts([answer] * 8), RewardConfig(workers=1, default=rule), "data") == ""


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"$\boxed{2}$ or $\boxed{3}$", r"\boxed{2, 3}", r"\boxed{3}"),
        (r"x_1=\boxed{1}, x_2=\boxed{2}", r"\boxed{1,2}", r"\boxed{2}"),
        (r"\left(\boxed{1}, \boxed{2}\right)", r"\boxed{(1,2)}", r"\boxed{2}"),
        (r"2\boxed{5}", r"\boxed{10}", r"\boxed{5}"),
        (r"\boxed{50}\%", r"\boxed{50\%}", r"\boxed{50 \text{ cm}}"),
        (r"\boxed{5} \text{ miles per hour}", r"\boxed{5}", r"\boxed{5 \text{ cm}}"),
    ],
)
def test_boxes_that_are_part_of_an_answer(gold: str, right: str, wrong: str) -> None:
    assert judge(RewardRule(), gold, right).verdict == "correct"
    assert judge(RewardRule(), gold, wrong).verdict == "wrong"


def test_a_source_without_a_rule_and_rules_of_ones_own() -> None:
    config = RewardConfig(default=None, sources={"mine": RewardRule(kind="function", function="nowhere:judge")})
    assert check_answers(prompts(["whatever"] * 9, "mine"), config, "data") == ""
    with pytest.raises(UsageError, match=r"data: no reward for source 's' \(s/0\): rewards.sources has mine"):
        check_answers(prompts(["1"]), config, "data")


def test_the_first_of_several_answers_stands_for_all() -> None:
    config = RewardConfig(workers=1, default=RewardRule(alternatives="|||"))
    assert check_answers(prompts([r"\pi|||3.14"] * 8), config, "data") == ""


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("He has 3 * 4 = <<3*4=12>>12 eggs.\n#### 12", r"\boxed{12}", r"\boxed{3}"),
        ("Since 2 + 2 = 4,\n#### 1,204 ", r"\boxed{1204}", r"\boxed{4}"),
        (r"We get that it is $\boxed{0.5}$, and not 3.", r"\boxed{1/2}", r"\boxed{3}"),
        ("#### 7", r"\boxed{7}", r"\boxed{4}"),
    ],
)
def test_whole_solutions_are_judged_by_their_answer(gold: str, right: str, wrong: str) -> None:
    for rule in (RewardRule(), RewardRule(kind="numeric")):
        assert judge(rule, gold, right).verdict == "correct"
        assert judge(rule, gold, wrong).verdict == "wrong"
