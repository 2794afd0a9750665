"""Numbers, exactly: no floating point, no evaluation, and sizes bounded before anything is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
MAX_EXPONENT = 400
# a decimal stands for an exact value that it rounds only if it shows that many digits
DIGITS_OF_AN_APPROXIMATION = 6

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_PLAIN_NUMBER = re.compile(rf"([+-]?)\s*({_DECIMAL})")
_EXPONENT = r"([+-]?\d{1,4})"
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*({_DECIMAL})\s*"
    rf"(?:[eE]\s*{_EXPONENT}|(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*{_EXPONENT}\s*\}}|(\d)))"
)
_POWER_OF_TEN = re.compile(r"([+-]?)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|(\d))")
_FRACTION = re.compile(rf"([+-]?)\s*\\frac\s*\{{\s*([+-]?)\s*({_DECIMAL})\s*\}}\s*\{{\s*([+-]?)\s*({_DECIMAL})\s*\}}")
_SLASH = re.compile(rf"([+-]?)\s*({_DECIMAL})\s*/\s*([+-]?)\s*({_DECIMAL})")
_MIXED = re.compile(r"([+-]?)\s*(\d+)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED_SLASH = re.compile(r"([+-]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True)
class Number:
    value: Fraction
    decimal: bool = False  # written with a decimal point: it may be rounded
    digits: int = 0  # significant ones, of a decimal
    last_place: Fraction = Fraction(0)  # what one step of its last digit is worth


def read_number(text: str) -> Number | None:
    """The number that `text` is, if it is nothing else. Integers, decimals, fractions, mixed and scientific ones."""
    if len(text) > MAX_DIGITS or not any(character.isdigit() for character in text[:40]) or not text.isascii():
        return None
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and "(" not in text[1:]:
        text = text[1:-1].strip()
    if match := _PLAIN_NUMBER.fullmatch(text):
        return _decimal(match[1], match[2], 0)
    if match := _SCIENTIFIC.fullmatch(text):
        return _decimal(match[1], match[2], int(match[3] or match[4] or match[5]))
    if match := _POWER_OF_TEN.fullmatch(text):
        return _decimal(match[1], "1", int(match[2] or match[3]))
    if match := _FRACTION.fullmatch(text):
        return _quotient(match[1] + match[2] + match[4], match[3], match[5])
    if match := _SLASH.fullmatch(text):
        return _quotient(match[1] + match[3], match[2], match[4])
    if match := (_MIXED.fullmatch(text) or _MIXED_SLASH.fullmatch(text)):
        whole, numerator, denominator = (int(match[i]) for i in (2, 3, 4))
        # 2 12/5 is not how a mixed number is written: more likely a product, or a slip
        if not 0 < numerator < denominator:
            return None
        return Number((whole + Fraction(numerator, denominator)) * (-1 if match[1] == "-" else 1))
    return None


def _decimal(sign: str, digits: str, exponent: int) -> Number | None:
    if abs(exponent) > MAX_EXPONENT:
        return None
    mantissa = digits.replace(",", "")
    whole, _, decimals = mantissa.partition(".")
    scale = Fraction(10) ** (exponent - len(decimals))
    value = int((whole + decimals) or "0") * scale * (-1 if sign == "-" else 1)
    is_decimal = bool(decimals) or exponent < 0
    return Number(value, is_decimal, len((whole + decimals).lstrip("0")) if is_decimal else 0, scale)


def _quotient(signs: str, numerator: str, denominator: str) -> Number | None:
    above, below = _decimal("", numerator, 0), _decimal("", denominator, 0)
    if above is None or below is None or below.value == 0:
        return None
    return Number(above.value / below.value * (-1) ** signs.count("-"))


def same_number(gold: Number, given: Number, tolerance: float = 0.0) -> bool:
    """Equal; or within the tolerance; or one is a decimal of six digits or more that rounds (or cuts) the other."""
    if gold.value == given.value:
        return True
    difference = abs(gold.value - given.value)
    if tolerance and difference <= abs(gold.value) * Fraction(tolerance):
        return True
    # only what no decimal can be (1/3, 22/7) is ever rounded: 0.1234561 for 0.123456 is another number
    for rounded, exact in ((given, gold), (gold, given)):
        endless = not exact.decimal and not _terminates(exact.value)
        if rounded.decimal and endless and rounded.digits >= DIGITS_OF_AN_APPROXIMATION:
            return difference < rounded.last_place
    return False


def _terminates(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
