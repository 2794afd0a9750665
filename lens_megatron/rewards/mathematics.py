"""Is this answer the golden one? Structure first, exact numbers next, a parser of mathematics only for what is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lens_megatron.rewards.latex import clean, nesting, plain
from lens_megatron.rewards.numbers import DIGITS_OF_AN_APPROXIMATION, read_number, same_number
from lens_megatron.rewards.structure import Grid, Leaf, Named, Node, Parts, read_structure
from lens_megatron.rewards.units import Unit, split_unit

MAX_NESTING = 20  # of brackets; golden answers have 6 at most
Outcome = Literal["same", "different", "not understood"]

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\s*[.)]?")
_CHOICE_WITH_VALUE = re.compile(r"\(?\s*([A-Z])\s*[).:]+\s*[^A-Za-z]+")
_BASE = re.compile(r"([+-]?[0-9A-Fa-f]+)_(?:\{(\d+)\}|(\d+))")
_WORDS = re.compile(r"\\text\s*\{[^{}]*[A-Za-z]{2,}[^{}]*\}|(?<![A-Za-z\\{_])[A-Za-z]{4,}(?![A-Za-z])")
_PERCENT = re.compile(r"(.*[\d})])\s*%", re.DOTALL)
_LATIN = re.compile(r"[\x20-\x7e°$€£¥\n\t]*")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")


@dataclass(frozen=True)
class Comparison:
    """How strictly two answers are compared; and what to do with expressions, which only a worker may parse."""

    tolerance: float
    percent: Literal["strict", "lenient"]
    same_expression: Callable[[str, str], bool | None]
    near: Callable[[str, Fraction, Fraction], bool]  # an expression, to a number, within a step


def compare(gold: str, given: str, how: Comparison) -> Outcome:
    """Of two answers as they were written."""
    if nesting(given) > MAX_NESTING:
        return "not understood"
    gold, given = clean(gold), clean(given)
    if not given or not gold:
        return "not understood"
    return compare_cleaned(gold, given, how)


def compare_cleaned(gold: str, given: str, how: Comparison) -> Outcome:
    if plain(gold) == plain(given):
        return "same"
    if not _LATIN.fullmatch(given):
        return "not understood"
    choice = _CHOICE.fullmatch(_unwrapped(gold))
    if choice is not None:
        answered = _unwrapped(given)
        match = _CHOICE.fullmatch(answered) or _CHOICE_WITH_VALUE.fullmatch(answered)
        return "same" if match is not None and match[1] == choice[1] else "different"
    return _compare_nodes(read_structure(gold), read_structure(given), how)


def share_found(gold: str, given: str, how: Comparison) -> float:
    """Of several answers: (found - wrong) / expected, at least 0."""
    wanted, offered = _answers(read_structure(clean(gold))), _answers(read_structure(clean(given)))
    found = _matched(wanted, offered, how)
    return max(0.0, (found - (len(offered) - found)) / len(wanted))


def _answers(node: Node) -> list[Node]:
    node = _value(node)
    return list(node.items) if isinstance(node, Parts) and node.kind in ("list", "set") else [node]


def _compare_nodes(gold: Node, given: Node, how: Comparison) -> Outcome:
    if isinstance(gold, Named) or isinstance(given, Named):
        return _compare_named(gold, given, how)
    if isinstance(gold, Parts):
        return _compare_parts(gold, given, how) if isinstance(given, Parts) else "different"
    if isinstance(gold, Grid):
        if not isinstance(given, Grid) or [len(row) for row in gold.rows] != [len(row) for row in given.rows]:
            return "different"
        cells = zip((c for row in gold.rows for c in row), (c for row in given.rows for c in row), strict=True)
        return _all(_compare_nodes(a, b, how) for a, b in cells)
    if not isinstance(given, Leaf):
        return "different"
    return compare_leaves(gold.text, given.text, how)


def _value(node: Node) -> Node:
    return node.value if isinstance(node, Named) else node


def _compare_named(gold: Node, given: Node, how: Comparison) -> Outcome:
    """x = 3 is 3, but not y = 3."""
    if isinstance(gold, Named) and isinstance(given, Named) and plain(gold.name) != plain(given.name):
        if isinstance(gold.value, Leaf) and isinstance(given.value, Leaf):  # y = 2x and x = y/2 are the same line
            return _expressions(f"{gold.name} = {gold.value.text}", f"{given.name} = {given.value.text}", how)
        return "different"
    if isinstance(gold, Named) and not isinstance(given, Named) and isinstance(given, Leaf) and "=" in given.text:
        if isinstance(gold.value, Leaf):
            return _expressions(f"{gold.name} = {gold.value.text}", given.text, how)
        return "different"
    if isinstance(given, Named) and isinstance(gold, Leaf) and "=" in gold.text and isinstance(given.value, Leaf):
        return _expressions(gold.text, f"{given.name} = {given.value.text}", how)
    return _compare_nodes(_value(gold), _value(given), how)


def _compare_parts(gold: Parts, given: Parts, how: Comparison) -> Outcome:
    if gold.kind == "ordered" or given.kind == "ordered":
        if gold.kind != given.kind or gold.brackets != given.brackets or len(gold.items) != len(given.items):
            return "different"
        return _all(_compare_nodes(a, b, how) for a, b in zip(gold.items, given.items, strict=True))
    if (gold.kind == "union") != (given.kind == "union"):
        return "different"
    wanted, offered = list(gold.items), list(given.items)
    if len(wanted) != len(offered):
        return "different"
    if len(_names(wanted)) > 1 and not _names(offered):  # x = 1, y = 2 as 1, 2: then in that order
        return _all(_compare_nodes(a, b, how) for a, b in zip(wanted, offered, strict=True))
    return "same" if _matched(wanted, offered, how) == len(wanted) else "different"


def _names(nodes: list[Node]) -> set[str]:
    return {node.name for node in nodes if isinstance(node, Named)}


def _matched(wanted: list[Node], offered: list[Node], how: Comparison) -> int:
    """How many of the wanted are among the offered, each offer used once."""
    left = list(offered)
    for node in wanted:
        hit = next((i for i, offer in enumerate(left) if _compare_nodes(node, offer, how) == "same"), None)
        if hit is not None:
            del left[hit]
    return len(offered) - len(left)


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    for outcome in outcomes:
        if outcome != "same":
            return outcome
    return "same"


def compare_leaves(gold: str, given: str, how: Comparison) -> Outcome:
    if plain(gold) == plain(given):
        return "same" if plain(gold) else "not understood"
    a, b = read_number(gold), read_number(given)
    if a is not None and b is not None:
        return "same" if same_number(a, b, how.tolerance) else "different"
    for left, right in ((gold, given), (given, gold)):
        if _PERCENT.fullmatch(left):
            return _percent(left, right, left is gold, how)
    if _BASE.fullmatch(gold) or _BASE.fullmatch(given):
        return "same" if _base_and_digits(gold) == _base_and_digits(given) else "different"
    if _RATIO.fullmatch(gold) or _RATIO.fullmatch(given):
        return "different"  # of other numbers, or against no ratio at all
    return _quantities(gold, given, how)


def _percent(with_sign: str, other: str, gold_has_sign: bool, how: Comparison) -> Outcome:
    match = _PERCENT.fullmatch(with_sign)
    assert match is not None
    other_match = _PERCENT.fullmatch(other)
    if other_match is not None:
        return compare_leaves(match[1], other_match[1], how)
    if split_unit(other)[1] is not None:
        return "different"  # 73 degrees are not 73%
    readings = [rf"\frac{{{match[1]}}}{{100}}"]
    number = read_number(match[1])
    if number is not None:
        readings = [f"{number.value.numerator}/{number.value.denominator * 100}"]
    if gold_has_sign or how.percent == "lenient":
        readings.append(match[1])  # the question asked for per cent
    pairs = [(reading, other) if gold_has_sign else (other, reading) for reading in readings]
    outcomes = [compare_leaves(*pair, how) for pair in pairs]
    return "same" if "same" in outcomes else outcomes[0]


def _quantities(gold: str, given: str, how: Comparison) -> Outcome:
    """With units: a missing one is forgiven, a different one is not."""
    gold_value, gold_unit = split_unit(gold)
    value, unit = split_unit(given)
    if gold_unit is not None and unit is None:
        value, unit = _same_dimension(given, gold_unit) or (value, unit)
    elif unit is not None and gold_unit is None:
        gold_value, gold_unit = _same_dimension(gold, unit) or (gold_value, gold_unit)
    if gold_unit is None and unit is None:
        return _words_or_expressions(gold, given, how)
    if gold_unit is not None and unit is not None:
        if gold_unit.dimensions != unit.dimensions:
            return "different"
        if gold_unit.size != unit.size:
            return _converted(gold_value, gold_unit, value, unit, how)
    return compare_leaves(gold_value, value, how) if (gold_value, value) != (gold, given) else "different"


def _same_dimension(text: str, other: Unit) -> tuple[str, Unit] | None:
    """5 m against 500 centimetres: there m is the metre."""
    value, unit = split_unit(text, letters=True)
    return (value, unit) if unit is not None and unit.dimensions == other.dimensions else None


def _converted(gold: str, gold_unit: Unit, given: str, unit: Unit, how: Comparison) -> Outcome:
    a, b = read_number(gold), read_number(given)
    if a is None or b is None:
        factor = unit.size / gold_unit.size
        return _expressions(gold, rf"({given}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}", how)
    return "same" if a.value * gold_unit.size == b.value * unit.size else "different"


def _words_or_expressions(gold: str, given: str, how: Comparison) -> Outcome:
    if _WORDS.search(gold) or _WORDS.search(given):
        if not _WORDS.search(gold) and not re.search(r"\d", given):
            return "not understood"  # "no idea" is no number
        return "same" if _spoken(gold) == _spoken(given) != "" else "different"
    return _expressions(gold, given, how)


def _expressions(gold: str, given: str, how: Comparison) -> Outcome:
    given = _last_of_chain(gold, given, how)
    same = how.same_expression(gold, given)
    if same is None:
        return "not understood"
    if same:
        return "same"
    for decimal, exact in ((given, gold), (gold, given)):
        if _rounds(decimal, exact, how):
            return "same"
    return "different"


def _last_of_chain(gold: str, given: str, how: Comparison) -> str:
    """2 + 3 = 5 is 5 when it is true."""
    members = given.split("=")
    if "=" in gold or len(members) < 2 or not all(member.strip() for member in members):
        return given
    values = members[1:] if re.fullmatch(r"\s*\\?[A-Za-z]\w*\s*", members[0]) else members
    if all(how.same_expression(values[-1].strip(), member.strip()) for member in values[:-1]):
        return values[-1].strip()
    return given


def _rounds(decimal: str, exact: str, how: Comparison) -> bool:
    """A decimal of six digits or more for an exact expression, 3.14159 for pi; or any number within the tolerance."""
    number = read_number(decimal)
    if number is None or re.search(r"\d\.\d", exact):
        return False
    step = abs(number.value) * Fraction(how.tolerance)
    if number.decimal and number.digits >= DIGITS_OF_AN_APPROXIMATION:
        step = max(step, number.last_place)
    return step > 0 and how.near(exact, number.value, step)


def _base_and_digits(text: str) -> tuple[str, str] | str:
    match = _BASE.fullmatch(text.replace(" ", ""))
    return (match[1].lower().removeprefix("+"), match[2] or match[3]) if match else text


def _unwrapped(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    return re.sub(r"^(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+", "", text)


def _spoken(text: str) -> str:
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).lower()
    text = re.sub(r"\b(?:a|an|the)\b", " ", text)
    return re.sub(r"[\s.,;!\"']+", "", text)
