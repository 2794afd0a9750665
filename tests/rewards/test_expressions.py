"""The parser's shortcuts and the comparison of values, against slower ways to the same thing."""

from __future__ import annotations

import builtins
import re
from fractions import Fraction

import mpmath
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.rewards.expressions import (
    near,
    parse_fully,
    parse_quickly,
    read_expression,
    same_expression,
)
from lens_megatron.rewards.extract import boxed
from lens_megatron.rewards.latex import clean
from lens_megatron.rewards.values import evaluate
from tests.rewards.pairs import PAIRS

_texts = {clean(text) for _, gold, response, _ in PAIRS for text in (gold, boxed(response) or "")}
EXPRESSIONS = sorted(text for text in _texts if re.search(r"[A-Za-z\\^]", text))


def test_the_quick_parser_gives_the_same_tree_or_none() -> None:
    quick = {text: parse_quickly(text) for text in EXPRESSIONS}
    answered = [text for text, tree in quick.items() if tree is not None]
    assert [text for text in answered if quick[text] != parse_fully(text)] == []
    assert len(answered) > 0.5 * len(EXPRESSIONS)


def test_reading_never_evaluates_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's eval is what sympy makes of text; the grammar's own reader of numbers calls it."""
    calls: list[object] = []
    real = builtins.eval
    monkeypatch.setattr(builtins, "eval", lambda *args: calls.append(args[0]) or real(*args))
    read_expression.cache_clear()
    for text in EXPRESSIONS:
        read_expression(text)
    assert calls == []
    sympy.sympify("2")
    assert calls  # the spy sees it when it happens


_leaf = st.one_of(st.integers(1, 30).map(str), st.sampled_from(["x", "y", r"\pi", r"\sqrt{2}"]))
_tree = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: f"({p[0]}+{p[1]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}-{p[1]})"),
        st.tuples(inner, inner).map(lambda p: rf"{p[0]} \cdot {p[1]}"),
        st.tuples(inner, inner).map(lambda p: rf"\frac{{{p[0]}}}{{{p[1]}}}"),
        st.tuples(inner, st.integers(2, 3)).map(lambda p: f"({p[0]})^{{{p[1]}}}"),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(_tree, _tree)
def test_values_agree_with_simplify(left: str, right: str) -> None:
    first, second = read_expression(left), read_expression(right)
    assert first is not None and second is not None
    difference = sympy.simplify(first.doit() - second.doit())
    if difference.has(sympy.zoo, sympy.nan):
        return  # 1 / (x - x): no value anywhere
    assert same_expression(left, right) is (difference == 0)


@settings(max_examples=40, deadline=None)
@given(_tree)
def test_another_form_of_an_expression_is_the_same(text: str) -> None:
    expression = read_expression(text)
    expanded = sympy.expand(expression.doit())
    if expanded.has(sympy.zoo, sympy.nan):
        return
    assert same_expression(text, sympy.latex(expanded)) is True
    assert same_expression(text, sympy.latex(expanded + 1)) is False


def test_near_is_strict_about_the_step() -> None:
    assert near(r"\pi", Fraction(314, 100), Fraction(2, 1000))
    assert not near(r"\pi", Fraction(314, 100), Fraction(1, 1000))
    assert not near("x", Fraction(1), Fraction(10))


def test_values_have_more_than_fifty_digits() -> None:
    value = evaluate(read_expression(r"\sqrt{2}"), {})
    with mpmath.workdps(60):
        assert abs(value**2 - 2) < mpmath.mpf(10) ** -55
