"""Two LaTeX expressions: are they the same mathematics? Runs in a reward worker only, under its limits.

math-verify's grammar reads them. Their values at several points (values.py) then decide: that is faster than simplifying,
and unlike rounding to a fixed number of decimals it does not take 1e-9 for 2e-9. What cannot be evaluated (a sum, a
limit, an integral) is left to math-verify's own comparison.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from antlr4 import PredictionMode  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy  # type: ignore[import-untyped]
from math_verify import verify  # type: ignore[import-untyped]

from lens_megatron.rewards.latex import nesting
from lens_megatron.rewards.values import AGREEMENT, PRECISION, NotEvaluable, TooLarge, evaluate, same_value

MAX_COMPLEXITY = 24

_CONVERSION = ConversionConfig(lowercase_symbols=False)
# computed already while reading, so they are bounded before: \binom{10^9}{5} would take for ever
_EAGER = re.compile(r"\\(?:binom|gcd|lcm|det|min|max)(?![A-Za-z])")
_LARGE = re.compile(r"\d{5}|\^|!")
_LETTER_TO_A_POWER = re.compile(r"(?<![A-Za-z\\_])(?<!_\{)([abcjkm-zA-DF-HJ-Z])\s*\^")
_LARGE_EXPONENT = re.compile(r"\d[eE][+-]?\d{4}")
_NUMERAL = re.compile(r"\d[\d,]*(?:\.\d*)?|\.\d+")
_NUMERIC_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")


class _Reader(_Latex2Sympy):
    """The grammar of math-verify, without its two costs: numbers made by Python's eval, and full-context prediction."""

    mode = PredictionMode.LL

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self.mode
        return parser

    def parse_number(self, text: str) -> Any:
        return sympy.Rational(text.replace(",", "").strip())  # 0.1 is one tenth, and not the nearest binary number

    def convert_postfix_list(self, arr: Any, i: int = 0) -> Any:
        """What stands side by side. The grammar adds an integer and any number behind it: 2(3) would be 5, and so would 2 3."""
        whole, after = arr[i].getText(), arr[i + 1].getText() if i + 1 < len(arr) else ""
        if (fraction := _NUMERIC_FRACTION.fullmatch(after)) and _NUMERAL.fullmatch(whole):
            numerator, denominator = int(fraction[1]), int(fraction[2])
            if not whole.isdecimal() or not 0 < numerator < denominator:
                raise ValueError(f"{whole} {after}: a product, or a slip in a mixed number")
            mixed = int(whole) + sympy.Rational(numerator, denominator)
            return mixed if i + 2 == len(arr) else self.mul_flat(mixed, self._factors(arr, i + 2))
        return self._factors(arr, i)

    def _factors(self, arr: Any, i: int) -> Any:
        """A product of arr[i] and what follows."""
        first = self.convert_postfix(arr[i])
        if i + 1 == len(arr) or isinstance(first, list):  # a list: d/dx
            return super().convert_postfix_list(arr, i)
        written, after = arr[i].getText(), arr[i + 1].getText()
        if after[0] in "0123456789." and (_NUMERAL.fullmatch(written) or _NUMERIC_FRACTION.fullmatch(written)):
            raise ValueError("two numbers side by side are no number")
        rest = self.convert_postfix_list(arr, i + 1)
        if isinstance(first, sympy.MatrixBase) or isinstance(rest, sympy.MatrixBase):
            return self.mat_mul_flat(first, rest)
        return self.mul_flat(first, rest)


class _QuickReader(_Reader):
    """Weaker prediction, four times as fast: it gives the same tree, or fails."""

    mode = PredictionMode.SLL


def parse_quickly(latex: str) -> Any:
    """None when this text needs the full prediction. A letter's power does unless the letter stands in braces."""
    return _parse(_QuickReader, _LETTER_TO_A_POWER.sub(r"{\1}^", latex))


def parse_fully(latex: str) -> Any:
    return _parse(_Reader, latex)


def _parse(reader: type[_Reader], latex: str) -> Any:
    try:
        return reader(is_real=True, convert_degrees=False, config=_CONVERSION).parse(latex)
    except MemoryError:
        raise
    except Exception:  # the grammar's errors are plain Exceptions, and its code meets trees it did not expect
        return None


@lru_cache(maxsize=256)
def read_expression(latex: str) -> Any:
    """The expression, or None when it cannot be understood."""
    if not latex or _complexity(latex) > MAX_COMPLEXITY or _LARGE_EXPONENT.search(latex):
        return None
    if _EAGER.search(latex) and _LARGE.search(latex):
        return None
    # the grammar takes I_0, I(0) for the imaginary unit, and e_1 for Euler's number
    latex = re.sub(r"(?<![A-Za-z\\])([IeE])(?=\s*[_(])", r"\\Theta_{\1}", latex)
    latex = latex.replace("'", r"^{\prime}") if "'" in latex else latex
    latex = re.sub(r"\\text\s*\{([A-Za-z])\}", r"\1", latex)
    expression = parse_quickly(latex)
    if expression is None:
        expression = parse_fully(latex)
    return expression if isinstance(expression, (sympy.Basic, sympy.MatrixBase)) else None


def _complexity(latex: str) -> int:
    """A tower of powers needs no brackets, nor do a row of factorials or roots."""
    return max(nesting(latex), latex.count("^") // 2, latex.count("!"), latex.count(r"\sqrt") // 2)


def same_expression(gold: str, given: str) -> bool | None:
    """None: one of them cannot be understood."""
    left, right = read_expression(gold), read_expression(given)
    if left is None or right is None:
        return None
    if left == right:
        return not left.has(sympy.nan, sympy.zoo)
    if isinstance(left, sympy.Eq) and isinstance(right, sympy.Eq):
        return _same_equation(left, right)
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        same = _same_values(left, right)
        return _math_verify_agrees(left, right) if same is None else same
    if isinstance(left, sympy.Expr) or isinstance(right, sympy.Expr):
        return False  # an equation, a relation or a set is not a value
    return _math_verify_agrees(left, right)


def near(expression: str, number: Fraction, step: Fraction) -> bool:
    """Whether an expression without symbols lies less than `step` from a number."""
    parsed = read_expression(expression)
    if not isinstance(parsed, sympy.Expr) or parsed.free_symbols:
        return False
    try:
        distance = abs(evaluate(parsed - sympy.Rational(number.numerator, number.denominator), {}))
    except (NotEvaluable, TooLarge, ZeroDivisionError, ValueError):
        return False
    return bool(distance < mpmath.mpf(step.numerator) / step.denominator)


def _math_verify_agrees(gold: Any, given: Any) -> bool:
    return bool(verify(gold, given, timeout_seconds=None))


def _same_equation(gold: Any, given: Any) -> bool:
    """The same up to a factor: x - 2y = 4 and 4y = 2x - 8."""
    ratios = []
    for point in _points(gold, given):
        try:
            left = evaluate(gold.lhs, point) - evaluate(gold.rhs, point)
            right = evaluate(given.lhs, point) - evaluate(given.rhs, point)
            with mpmath.workdps(PRECISION):
                ratios.append(left / right)
        except (NotEvaluable, TooLarge, ZeroDivisionError, ValueError):
            continue
    if len(ratios) < 3:
        return _math_verify_agrees(gold, given)
    with mpmath.workdps(PRECISION):
        return (
            all(abs(ratio - ratios[0]) <= AGREEMENT * abs(ratios[0]) for ratio in ratios) and abs(ratios[0]) > AGREEMENT
        )


def _same_values(gold: Any, given: Any) -> bool | None:
    """None: they cannot be evaluated at enough points."""
    points, compared = _points(gold, given), 0
    for point in points:
        try:
            same = same_value(gold, given, point)
        except NotEvaluable:
            return None
        except TooLarge:
            return False
        if same is False:
            return False
        compared += same is True
    return True if compared >= min(3, len(points)) else None


def _points(gold: Any, given: Any) -> list[dict[str, Fraction]]:
    """Values for the symbols: of both signs; and small integers where an expression jumps between them."""
    names = sorted({symbol.name for side in (gold, given) for symbol in side.free_symbols} - {"i"})
    if not names:
        return [{}]
    random = Random(len(names))

    def value(low: float, high: float) -> Fraction:
        return Fraction(round(random.uniform(low, high) * 99991), 99991)  # a prime: nothing cancels by chance

    points = [{name: value(0.2, 3) for name in names} for _ in range(2)]
    points += [{name: value(-3, 3) for name in names} for _ in range(3)]
    points += [{name: value(5, 60) for name in names}]
    stepwise = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod)
    if gold.has(*stepwise) or given.has(*stepwise):
        points = [{name: Fraction(n + 3 * j) for j, name in enumerate(names)} for n in range(1, 18)]
        points += [{name: value(1, 40) for name in names} for _ in range(6)]
    return points
