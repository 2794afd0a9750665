import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.purification.eligibility import eligible_tokens
from lens_megatron.types import Prompt

BOS, END = 900, 901


def prompt(tokens: list[int], question: tuple[int, int]) -> Prompt:
    return Prompt(id="p", tokens=tuple(tokens), question=question, answer="")


def test_question_scope_keeps_template_and_system_prompt() -> None:
    templated = prompt([BOS, 5, 6, 10, 11, END, 12, 7], question=(3, 7))
    assert eligible_tokens(templated, {BOS, END}, "question").tolist() == [
        False, False, False, True, True, False, True, False,
    ]  # fmt: skip


def test_prompt_scope_offers_every_token_but_specials_and_the_first() -> None:
    templated = prompt([4, 5, 6, 10, 11, END, 12, 7], question=(3, 7))
    assert eligible_tokens(templated, {BOS, END}, "prompt").tolist() == [
        False, True, True, True, True, False, True, True,
    ]  # fmt: skip


@given(st.lists(st.sampled_from([1, 2, 3, BOS, END]), min_size=1, max_size=12), st.data())
def test_rules_hold_for_any_prompt(tokens: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(tokens)))
    end = data.draw(st.integers(start, len(tokens)))
    question = eligible_tokens(prompt(tokens, (start, end)), {BOS, END}, "question").tolist()
    literal = eligible_tokens(prompt(tokens, (start, end)), {BOS, END}, "prompt").tolist()
    for t, token in enumerate(tokens):
        assert literal[t] == (t != 0 and token not in (BOS, END))
        assert question[t] == (literal[t] and start <= t < end)


def test_a_question_outside_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="question span"):
        eligible_tokens(prompt([1, 2], (1, 3)), set(), "question")
