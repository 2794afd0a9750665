"""The value of an expression at a point: exactly where it is rational, else to as many digits as a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from random import Random
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from sympy.core.function import AppliedUndef  # type: ignore[import-untyped]

PRECISION = 60
MOST_EXTRA_DIGITS = 2000
AGREEMENT = mpmath.mpf(10) ** -40
NEARLY = mpmath.mpf(10) ** -20  # e^(pi sqrt 163) and the integer next to it agree in 30 digits: look closer
ZERO = mpmath.mpf(10) ** -55
MAX_BITS = 1 << 20  # of a power or factorial: beyond, nobody wrote an answer
MAX_BITS_OF_A_FRACTION = 1 << 17  # which is reduced at every step

Point = Mapping[str, Fraction]


class NotEvaluable(Exception):
    """An expression has no number at a point."""


class TooLarge(Exception):
    """Its number has more digits than anyone writes as an answer."""


def same_value(gold: Any, given: Any, point: Point) -> bool | None:
    """None: a pole of one of them."""
    try:
        left, right = exact(gold, point), exact(given, point)
        if left is not None and right is not None:
            return left == right
        first, second = evaluate(gold, point), evaluate(given, point)
        larger, difference = max(abs(first), abs(second)), abs(first - second)
        if difference > max(ZERO, NEARLY * larger):
            return False
        if larger == 0 or (difference <= AGREEMENT * larger and 1e-5 < larger < 1e5):
            return True
        # 2^200 pi and 2^200 pi + 1 share sixty digits, as do numbers near 0: decide beyond their own size
        with mpmath.workdps(PRECISION):
            digits = PRECISION + min(MOST_EXTRA_DIGITS, 2 * abs(int(mpmath.log10(larger))))
        with mpmath.workdps(digits):
            difference = abs(evaluate(gold, point, digits) - evaluate(given, point, digits))
            return bool(difference <= max(AGREEMENT * min(1, larger), larger * mpmath.mpf(10) ** (20 - digits)))
    except (ZeroDivisionError, ValueError):
        return None


def exact(node: Any, point: Point) -> Fraction | None:
    """None: not rational, or not known to be."""
    if isinstance(node, sympy.Symbol):
        return point.get(node.name)
    if isinstance(node, sympy.Rational):
        return Fraction(int(node.p), int(node.q))
    if not isinstance(node, _EXACT):
        return None
    values = [exact(argument, point) for argument in node.args]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if isinstance(node, sympy.Add):
        return sum(known, Fraction(0))
    if isinstance(node, (sympy.Mul, sympy.UnevaluatedExpr)):
        return math.prod(known, start=Fraction(1))
    if isinstance(node, sympy.Pow):
        return _exact_power(*known)
    if isinstance(node, sympy.Abs):
        return abs(known[0])
    if isinstance(node, (sympy.floor, sympy.ceiling)):
        return Fraction(math.floor(known[0]) if isinstance(node, sympy.floor) else math.ceil(known[0]))
    if any(value.denominator > 1 or not 0 <= value <= 50_000 for value in known):
        return None
    whole = [int(value) for value in known]
    return Fraction(math.factorial(whole[0]) if isinstance(node, sympy.factorial) else math.comb(*whole))


_EXACT = (
    sympy.Add, sympy.Mul, sympy.UnevaluatedExpr, sympy.Pow, sympy.Abs, sympy.floor, sympy.ceiling, sympy.factorial,
    sympy.binomial,
)  # fmt: skip


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator > 1:
        return None
    bits = abs(int(exponent)) * max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > (MAX_BITS if base.denominator == 1 else MAX_BITS_OF_A_FRACTION):
        return None  # evaluate() refuses it, or reads its first digits
    return base ** int(exponent)


_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    sympy.exp: mpmath.exp, sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan, sympy.cot: mpmath.cot,
    sympy.sec: mpmath.sec,
    sympy.csc: mpmath.csc, sympy.asin: mpmath.asin, sympy.acos: mpmath.acos, sympy.atan: mpmath.atan,
    sympy.sinh: mpmath.sinh,
    sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh, sympy.Abs: abs, sympy.re: mpmath.re, sympy.im: mpmath.im,
    sympy.conjugate: mpmath.conj,
    sympy.floor: mpmath.floor, sympy.ceiling: mpmath.ceil,
}  # fmt: skip


def evaluate(expression: Any, point: Point, digits: int = PRECISION) -> Any:
    """A value to so many digits. Sizes are checked before a power or factorial is taken."""
    with mpmath.workdps(digits):
        value = _value(expression, point)
        if not mpmath.isfinite(value):
            raise ValueError("not finite")
        return value


def _value(node: Any, point: Point) -> Any:
    if isinstance(node, sympy.Symbol):
        return mpmath.j if node.name == "i" else mpmath.mpf(point[node.name].numerator) / point[node.name].denominator
    if isinstance(node, sympy.Rational):
        return mpmath.mpf(node.p) / node.q
    if isinstance(node, sympy.Float):
        return mpmath.mpf(str(node))
    if node is sympy.I:
        return mpmath.j
    if isinstance(node, sympy.NumberSymbol):
        return mpmath.mpf(node._as_mpf_val(mpmath.mp.prec))
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


def _sum_or_product(node: Any, point: Point) -> Any:
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
