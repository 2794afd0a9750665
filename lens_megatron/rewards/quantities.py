"""Numbers and units, exactly: no floating point, no evaluation, and sizes bounded before anything is computed."""

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
_SCIENTIFIC = re.compile(
    rf"([+-]?)\s*({_DECIMAL})\s*(?:[eE]\s*([+-]?\d{{1,4}})|(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([+-]?\d{{1,4}})\s*\}}|(\d)))"
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
    whole, point, decimals = mantissa.partition(".")
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


# Units: name -> (size in the base unit of its dimension, dimension).
_UNITS: dict[str, tuple[Fraction, str]] = {}


def _register(dimension: str, table: dict[str, str]) -> None:
    for names, size in table.items():
        for name in names.split():
            _UNITS[name] = (Fraction(size), dimension)


_register("length", {
    "m meter meters metre metres": "1", "cm centimeter centimeters centimetre centimetres": "1/100", "mm millimeter millimeters": "1/1000",
    "km kilometer kilometers kilometre kilometres": "1000", "dm": "1/10", "nm": "1/1000000000", "in inch inches": "0.0254",
    "ft foot feet": "0.3048", "yd yard yards": "0.9144", "mi mile miles": "1609.344",
})  # fmt: skip
_register("time", {
    "s sec secs second seconds": "1", "ms": "1/1000", "min mins minute minutes": "60", "h hr hrs hour hours": "3600", "day days": "86400",
    "week weeks": "604800", "month months": "2629746", "year years yr yrs": "31556952",
})  # fmt: skip
_register("mass", {"g gram grams": "1", "kg kilogram kilograms": "1000", "mg": "1/1000", "lb lbs pound pounds": "453.59237",
                   "oz ounce ounces": "28.349523125", "ton tons tonne tonnes": "1000000"})  # fmt: skip
_register(
    "volume",
    {
        "l L liter liters litre litres": "1",
        "ml mL milliliter milliliters": "1/1000",
        "gallon gallons gal": "3.785411784",
    },
)
_register("money", {"$ dollar dollars usd": "1", "cent cents ¢": "1/100"})
_register("euro", {"€ euro euros": "1"})
_register("british pound", {"£": "1"})
_register("yuan", {"yuan rmb ¥": "1"})
_register("rupee", {"rupee rupees": "1"})
_register("angle", {"° degree degrees deg": "1", "rad radian radians": "1000"})  # 1000: never mistaken for degrees
_register("Celsius", {"°C": "1"})
_register("Fahrenheit", {"°F": "1"})
_register("temperature", {"K kelvin kelvins": "1"})
_register("energy", {"J joule joules": "1", "kJ": "1000", "erg ergs": "1/10000000", "eV": "1.602176634e-19"})
_register("power", {"W watt watts": "1", "kW": "1000"})
_register("force", {"N newton newtons": "1"})
_register("pressure", {"Pa pascal pascals": "1", "kPa": "1000"})
_register("frequency", {"Hz hertz": "1", "kHz": "1000", "MHz": "1000000"})
_register("voltage", {"V volt volts": "1"})
_register("current", {"A amp amps ampere amperes": "1"})
_register("speed", {"mph": "0.44704", "kmph kph": "5/18"})
_register("amount", {"mol mole moles": "1"})
_register("square", {"square sq": "1"})
_register("cubic", {"cubic cu": "1"})
_register("per", {"per /": "1"})
for _noun in (
    "unit units way ways student students people person persons apple apples orange oranges ball balls marble marbles coin coins book books "
    "card cards point points digit digits number numbers integer integers solution solutions root roots pair pairs triple triples time times "
    "game games car cars train trains page pages box boxes bag bags tile tiles cube cubes triangle triangles rectangle rectangles "
    "line lines edge edges face faces vertex vertices boy boys girl girls child children man men woman women member members house houses "
    "egg eggs cookie cookies candy candies ticket tickets chair chairs table tables dog dogs cat cats bird birds fish cow cows chicken "
    "chickens tree trees flower flowers pencil pencils pen pens sheet sheets step steps turn turns round rounds move moves path paths "
    "subset subsets element elements value values term terms question questions problem problems vote votes row rows column columns "
    "seat seats side sides diagonal diagonals arrangement arrangements combination combinations permutation permutations outcome outcomes "
    "word words letter letters gift gifts shirt shirts hat hats player players team teams worker workers passenger passengers monkey "
    "monkeys rope ropes bus buses bottle bottles cup cups piece pieces slice slices"
).split():
    _UNITS.setdefault(
        _noun, (Fraction(1), "count:" + (_noun[:-1] if _noun.endswith("s") and len(_noun) > 3 else _noun))
    )

_UNIT_WORD = re.compile(r"(°\s*[CF]\b|°|[A-Za-z]+|[$€£¥¢]|/)(?:\s*\^\s*\{?\s*(-?\d)\s*\}?)?\s*(?:\\cdot|\*|·)?\s*")
# Letters that are as likely a variable: a unit only inside \text{} or \mathrm{}.
_AMBIGUOUS = {name for name in _UNITS if len(name) == 1 and name.isalpha()} | {"in"}
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Unit:
    size: Fraction
    dimensions: frozenset[tuple[str, int]]


def read_unit(text: str) -> Unit | None:
    """Square feet, km/h, cm^2, m s^{-1}: a product of known units; None for anything else."""
    size, powers, pending, side, position = Fraction(1), {}, 1, 1, 0
    text = text.strip()
    if not text or len(text) > 60:
        return None
    while position < len(text):
        match = _UNIT_WORD.match(text, position)
        if match is None:
            return None
        position = match.end()
        name = match[1].replace(" ", "")
        known = _UNITS.get(name) or _UNITS.get(name.lower())
        if known is None:
            return None
        worth, dimension = known
        if dimension == "per":
            side = -1
        elif dimension in ("square", "cubic"):
            pending = 2 if dimension == "square" else 3
        else:
            power = int(match[2] or 1) * pending * side
            if abs(power) > 4:
                return None
            if dimension == "volume":
                dimension, worth, power = "length", worth / 1000, power * 3
                size *= worth ** (power // 3)
            elif dimension == "speed":
                size *= worth**power
                powers["length"] = powers.get("length", 0) + power
                dimension, power = "time", -power
            else:
                size *= worth**power
            powers[dimension] = powers.get(dimension, 0) + power
            pending = 1
    if not any(powers.values()):
        # "square" alone: a count of squares
        return Unit(Fraction(1), frozenset({("count:square", 1)})) if text in ("square", "squares") else None
    return Unit(size, frozenset((dimension, power) for dimension, power in powers.items() if power))


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A cleaned answer without its unit, and the unit. The text comes back whole when it has none that is known."""
    text = text.strip()
    for sign in "$€£¥":
        if text.startswith((sign, "-" + sign)):
            rest, unit = split_unit(text.replace(sign, "", 1))
            if unit is None or unit == read_unit(sign):
                return rest, read_unit(sign)
            return text, None
    if text.endswith("°"):
        return text[:-1].strip(), read_unit("°")
    if re.fullmatch(r".*[\d})]\s*[$€£¥¢]", text, re.DOTALL):
        return text[:-1].strip(), read_unit(text[-1])
    for start in _unit_starts(text):
        tail = text[start:]
        written = _TEXT.sub(r" \1 ", tail)
        words = re.findall(r"[A-Za-z]+", _TEXT.sub("", tail))
        if any(word in _AMBIGUOUS for word in words):
            continue
        unit = read_unit(re.sub(r"\s+", " ", written))
        if unit is not None:
            return text[:start].strip(), unit
    return text, None


_START = re.compile(r"(?<=[\d})\]!°\s])\s*(?=\\text\s*\{|°|[A-Za-z]|/)")


def _unit_starts(text: str) -> list[int]:
    """Places where a unit could begin, the longest one first; in the last 80 characters."""
    offset = max(0, len(text) - 80)
    starts = [offset + match.start() for match in _START.finditer(text[offset:])]
    return [start for start in starts if start > 0 and _balanced(text[:start])]


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in ("{}", "()"))
