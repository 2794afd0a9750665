"""Units at the end of an answer: found, read, and comparable. 15 cm^2, 60 km/h, 18.90 dollars, 45 minutes, 5 apples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Units: name -> (size in the base unit of its dimension, dimension).
_UNITS: dict[str, tuple[Fraction, str]] = {}


def _register(dimension: str, table: dict[str, str]) -> None:
    for names, size in table.items():
        for name in names.split():
            _UNITS[name] = (Fraction(size), dimension)


_register(
    "length",
    {
        "m meter meters metre metres": "1",
        "cm centimeter centimeters centimetre centimetres": "1/100",
        "mm millimeter millimeters": "1/1000",
        "km kilometer kilometers kilometre kilometres": "1000",
        "dm": "1/10",
        "nm": "1/1000000000",
        "in inch inches": "0.0254",
        "ft foot feet": "0.3048",
        "yd yard yards": "0.9144",
        "mi mile miles": "1609.344",
    },
)
_register(
    "time",
    {
        "s sec secs second seconds": "1",
        "ms": "1/1000",
        "min mins minute minutes": "60",
        "h hr hrs hour hours": "3600",
        "day days": "86400",
        "week weeks": "604800",
        "month months": "2629746",
        "year years yr yrs": "31556952",
    },
)
_register(
    "mass",
    {
        "g gram grams": "1",
        "kg kilogram kilograms": "1000",
        "mg": "1/1000",
        "lb lbs pound pounds": "453.59237",
        "oz ounce ounces": "28.349523125",
        "ton tons tonne tonnes": "1000000",
    },
)
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
_register("angle", {"° degree degrees deg": "1"})
_register("radian", {"rad radian radians": "1"})  # a size of degrees that is irrational: not converted
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
_NOUNS = """
unit units way ways student students people person persons apple apples orange oranges ball balls marble marbles
coin coins book books card cards point points digit digits number numbers integer integers solution solutions root
roots pair pairs triple triples time times game games car cars train trains page pages box boxes bag bags tile tiles
cube cubes triangle triangles rectangle rectangles line lines edge edges face faces vertex vertices boy boys girl
girls child children man men woman women member members house houses egg eggs cookie cookies candy candies ticket
tickets chair chairs table tables dog dogs cat cats bird birds fish cow cows chicken chickens tree trees flower
flowers pencil pencils pen pens sheet sheets step steps turn turns round rounds move moves path paths subset subsets
element elements value values term terms question questions problem problems vote votes row rows column columns seat
seats side sides diagonal diagonals arrangement arrangements combination combinations permutation permutations
outcome outcomes word words letter letters gift gifts shirt shirts hat hats player players team teams worker workers
passenger passengers monkey monkeys rope ropes bus buses bottle bottles cup cups piece pieces slice slices
"""
for _noun in _NOUNS.split():
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
    size, pending, side, position = Fraction(1), 1, 1, 0
    powers: dict[str, int] = {}
    text = text.strip()
    if not text or len(text) > 60:
        return None
    while position < len(text):
        match = _UNIT_WORD.match(text, position)
        if match is None:
            return None
        position = match.end()
        name = match[1].replace(" ", "")
        known = _UNITS.get(name) or (_UNITS.get(name.lower()) if len(name) > 3 else None)  # m is not M
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


def split_unit(text: str, letters: bool = False) -> tuple[str, Unit | None]:
    """A cleaned answer without its unit, and the unit. The text comes back whole when it has none that is known.

    `letters`: a bare m, s or g counts as well. By itself it is as likely a variable.
    """
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
        if not letters and any(word in _AMBIGUOUS for word in words):
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
