"""Two LaTeX expressions: are they the same mathematics? Runs in a reward worker only, under its limits.

math-verify's grammar reads them. A value at several points, to 60 digits, then decides: it is faster than simplifying,
and unlike rounding to a fixed number of decimals it does not take 1e-9 for 2e-9. What cannot be evaluated (a sum, a
limit, an integral) is left to math-verify's own comparison.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from antlr4 import PredictionMode  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy  # type: ignore[import-untyped]
from math_verify import verify  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

from lens_megatron.rewards.latex import nesting

PRECISION = 60
AGREEMENT = mpmath.mpf(10) ** -40  # of e^(pi sqrt 163) and the integer next to it: 30 digits
ZERO = mpmath.mpf(10) ** -55
MAX_BITS = 1 << 20  # of a power or factorial: beyond, nobody wrote an answer
MAX_COMPLEXITY = 24

_CONVERSION = ConversionConfig(lowercase_symbols=False)
# computed already while reading, so they are bounded before: \binom{10^9}{5} would take for ever
_EAGER = re.compile(r"\\(?:binom|gcd|lcm|det|min|max)(?![A-Za-z])")
_LARGE = re.compile(r"\d{5}|\^|!")
_LETTER_TO_A_POWER = re.compile(r"(?<![A-Za-z\\_])(?<!_\{)([abcjkm-zA-DF-HJ-Z])\s*\^")
_LARGE_EXPONENT = re.compile(r"\d[eE][+-]?\d{4}")


class NotEvaluable(Exception):
    """An expression has no number at a point."""


class TooLarge(Exception):
    """Its number has more digits than anyone writes as an answer."""


class _Reader(_Latex2Sympy):
    """The grammar of math-verify, without its two costs: numbers made by Python's eval, and full-context prediction."""

    mode = PredictionMode.LL

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self.mode
        return parser

    def parse_number(self, text: str) -> Any:
        text = text.replace(",", "").strip()
        return sympy.Integer(int(text)) if text.isdecimal() else sympy.Float(text, 60)


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
    return all(_close(ratio, ratios[0]) for ratio in ratios) and abs(ratios[0]) > AGREEMENT


def _same_values(gold: Any, given: Any) -> bool | None:
    """None: they cannot be evaluated at enough points."""
    compared = 0
    points = _points(gold, given)
    for point in points:
        values = []
        for expression in (gold, given):
            try:
                values.append(evaluate(expression, point))
            except (ZeroDivisionError, ValueError):
                values.append(None)  # a pole
            except NotEvaluable:
                return None
            except TooLarge:
                return False
        if None in values:
            continue
        if not _close(values[0], values[1]):
            return False
        compared += 1
    return True if compared >= min(3, len(points)) else None


def _close(left: Any, right: Any) -> bool:
    with mpmath.workdps(PRECISION):
        return bool(abs(left - right) <= max(ZERO, AGREEMENT * max(abs(left), abs(right))))


def _points(gold: Any, given: Any) -> list[dict[str, Any]]:
    """Values for the symbols: of both signs; and small integers where an expression jumps between them."""
    names = sorted({symbol.name for side in (gold, given) for symbol in side.free_symbols} - {"i"})
    if not names:
        return [{}]
    random = Random(len(names))

    def value(low: float, high: float) -> Any:
        return mpmath.mpf(random.uniform(low, high))

    points = [{name: value(0.2, 3) for name in names} for _ in range(2)]
    points += [{name: value(-3, 3) for name in names} for _ in range(3)]
    points += [{name: value(5, 60) for name in names}]
    stepwise = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod)
    if gold.has(*stepwise) or given.has(*stepwise):
        points = [{name: mpmath.mpf(n + 3 * j) for j, name in enumerate(names)} for n in range(1, 18)]
        points += [{name: value(1, 40) for name in names} for _ in range(6)]
    return points


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    sympy.exp: mpmath.exp, sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan, sympy.cot: mpmath.cot,
    sympy.sec: mpmath.sec,
    sympy.csc: mpmath.csc, sympy.asin: mpmath.asin, sympy.acos: mpmath.acos, sympy.atan: mpmath.atan,
    sympy.sinh: mpmath.sinh,
    sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh, sympy.Abs: abs, sympy.re: mpmath.re, sympy.im: mpmath.im,
    sympy.conjugate: mpmath.conj,
    sympy.floor: mpmath.floor, sympy.ceiling: mpmath.ceil,
}  # fmt: skip


def evaluate(expression: Any, point: Mapping[str, Any]) -> Any:
    """A value to 60 digits. Sizes are checked before a power or factorial is taken."""
    with mpmath.workdps(PRECISION):
        value = _value(expression, point)
        if not mpmath.isfinite(value):
            raise ValueError("not finite")
        return value


def _value(node: Any, point: Mapping[str, Any]) -> Any:
    if isinstance(node, sympy.Symbol):
        return mpmath.j if node.name == "i" else point[node.name]
    if isinstance(node, sympy.Rational):
        return mpmath.mpf(node.p) / node.q
    if isinstance(node, sympy.Float):
        return mpmath.mpf(str(node))
    if node is sympy.I:
        return mpmath.j
    if isinstance(node, sympy.NumberSymbol):
        return mpmath.mpf(node._as_mpf_val(int(PRECISION * 3.4)))
    if isinstance(node, AppliedUndef):
        return _unknown_function(node.func.__name__, [_value(argument, point) for argument in node.args])
    if isinstance(node, sympy.Derivative):
        return _unknown_function(sympy.srepr(node), [])  # of an unknown: itself an unknown
    if isinstance(node, (sympy.Add, sympy.Mul, sympy.UnevaluatedExpr)):
        return _sum_or_product(node, point)
    if isinstance(node, sympy.Pow):
        return _power(_value(node.base, point), _value(node.exp, point))
    if isinstance(node, sympy.exp):
        return _power(mpmath.e, _value(node.args[0], point))
    if isinstance(node, sympy.log):
        return mpmath.log(*(_value(argument, point) for argument in node.args))
    if isinstance(node, (sympy.factorial, sympy.binomial)):
        return _combinatorial(node, [_value(argument, point) for argument in node.args])
    function = _FUNCTIONS.get(node.func)
    if function is None:
        raise NotEvaluable(str(node.func))
    arguments = [_value(argument, point) for argument in node.args]
    if any(mpmath.mag(argument) > PRECISION for argument in arguments if argument):
        raise TooLarge("an argument with no digit left after the point")
    return function(*arguments)


def _sum_or_product(node: Any, point: Mapping[str, Any]) -> Any:
    values = [_value(argument, point) for argument in node.args]
    if isinstance(node, sympy.Add):
        return mpmath.fsum(values)
    return mpmath.fprod(values)


def _power(base: Any, exponent: Any) -> Any:
    if base == 0 and mpmath.re(exponent) <= 0 and exponent != 0:
        raise ValueError("a pole")
    if base != 0 and abs(exponent) * max(1, abs(mpmath.mag(base))) > MAX_BITS:
        raise TooLarge("a power")
    return mpmath.power(base, exponent)


def _combinatorial(node: Any, values: list[Any]) -> Any:
    if any(abs(value) > 50_000 or mpmath.im(value) for value in values):
        raise TooLarge("a factorial")
    return mpmath.factorial(values[0]) if isinstance(node, sympy.factorial) else mpmath.binomial(*values)


def _unknown_function(name: str, arguments: list[Any]) -> Any:
    """f(x) of an f that nobody defined: some fixed smooth function, so that f(x) = g(y) only if they are the same."""
    random = Random(name)
    total = mpmath.mpf(random.uniform(1, 2))
    for argument in arguments:
        total += mpmath.sin(mpmath.mpf(random.uniform(0.5, 1.5)) * argument + mpmath.mpf(random.uniform(0, 1)))
    return total
