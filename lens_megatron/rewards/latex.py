r"""LaTeX of an answer brought to one spelling. Text in, text out: nothing is parsed or evaluated here.

After `clean`: no dollar signs, spacing commands, \left or \right; \frac and \sqrt with braces; every word command is
\text{...}; degrees are `°`, percent `%`, currency a leading `$`; Unicode mathematics as LaTeX.
"""

from __future__ import annotations

import re

_UNICODE = {
    "−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\leq ", "≥": r"\geq ",
    "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "²": "^{2}", "³": "^{3}", "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ", "φ": r"\phi ", "∅": r"\emptyset ", "\u00a0": " ",
    "\u2009": " ", "\u202f": " ",
    "º": "°", "˚": "°", "√": r"\sqrt",
}  # fmt: skip
# 10\,080: a thin space in thousands. A plain space may as well stand between two numbers.
_THIN = r"(?:\\,|\\thinspace(?![A-Za-z])|[\u00a0\u2009\u202f])"
_THIN_THOUSANDS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_THIN}\s*\d{{3}})+(?![\d])")
_UNICODE_TABLE = str.maketrans(_UNICODE)
_NAMES = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\le": r"\leq", r"\leqslant": r"\leq",
    r"\ge": r"\geq", r"\geqslant": r"\geq", r"\ne": r"\neq", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\degree": "°", r"\varnothing": r"\emptyset",
    r"\land": r"\text{and}",
    r"\lor": r"\text{or}", r"\colon": ":", r"\to": r"\rightarrow", r"\euro": "€", r"\pounds": "£", r"\prime": "'",
    r"\ast": "*", r"\lt": "<",
    r"\gt": ">", r"\lparen": "(", r"\rparen": ")",
}  # fmt: skip
_INVISIBLE = {
    r"\left", r"\right", r"\big", r"\Big", r"\bigg", r"\Bigg", r"\bigl", r"\bigr", r"\Bigl", r"\Bigr", r"\biggl",
    r"\biggr", r"\middle",
    r"\displaystyle", r"\textstyle", r"\limits", r"\nolimits", r"\quad", r"\qquad", r"\bf", r"\rm", r"\it",
    r"\mathstrut", r"\strut",
    r"\thinspace", r"\medspace", r"\displaylimits", r"\enspace",
}  # fmt: skip
_WORD = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|md|up)?|mbox|mathrm|mathbf|mathit|mathsf|mathtt|operatorname\*?|hbox)\s*\{"
)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FRAC = re.compile(r"\\frac\s*(?=[^\s{])([0-9A-Za-z])\s*(?=[^\s])(?:([0-9A-Za-z])|(?=\{))")
_FRAC_BRACED = re.compile(r"\\frac\s*\{([^{}]*)\}\s*([0-9A-Za-z])")
_SQRT = re.compile(r"\\sqrt\s*(\[[^\[\]]{1,5}\])?\s*(\d|[A-Za-z]|\\pi)")
_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z])")
_PLAIN_SQRT = re.compile(r"(?:\\sqrt|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)")
_CHOOSE = re.compile(r"\bC_\{?\s*(\d{1,4})\s*\}?\s*\^\s*\{?\s*(\d{1,4})\s*\}?")  # C_n^k, as in China
_DEGREES = re.compile(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?")


def clean(answer: str) -> str:
    """One spelling of an answer, whatever the habits of its writer."""
    text = _THIN_THOUSANDS.sub(lambda match: re.sub(_THIN, "", match.group()), answer).translate(_UNICODE_TABLE)
    text = text.replace("<=", r"\leq ").replace(">=", r"\geq ").replace("!=", r"\neq ")
    text = re.sub(r",\s*\\!\s*(?=\d)", "", text)  # 10,\!080
    text = text.replace(r"\$", "\x01").replace("$", " ").replace("\x01", "$").replace(r"\%", "%").replace("{,}", ",")
    text = re.sub(r"(?<!\\)\\[,;:!> \n]|~", " ", text)
    text = re.sub(r"\\(?:hspace|vspace|phantom)\*?\s*\{[^{}]*\}", " ", text)
    text = _WORD.sub(r"\\text{", text)
    text = _COMMAND.sub(lambda match: _renamed(match.group()), text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _DEGREES.sub("°", text)
    text = re.sub(r"\s*\\text\{\s*(?:percent|%)\s*\}|\s*\bpercent\b", "%", text)
    text = _PLAIN_SQRT.sub(r"\\sqrt{\1}", text)
    text = _FUNCTIONS.sub(r"\\\1 ", text)
    for _ in range(2):  # \frac\frac12 3 is beyond what people write
        text = _FRAC.sub(lambda match: rf"\frac{{{match[1]}}}" + (f"{{{match[2]}}}" if match[2] else ""), text)
        text = _FRAC_BRACED.sub(r"\\frac{\1}{\2}", text)
    text = _SQRT.sub(lambda match: rf"\sqrt{match[1] or ''}{{{match[2]}}}", text)
    return _trimmed(re.sub(r"\s+", " ", text))


def _renamed(command: str) -> str:
    if command in _INVISIBLE:
        return ""
    return _NAMES.get(command, command)


def _trimmed(text: str) -> str:
    """Without what surrounds an answer: spaces, a full stop, empty braces."""
    before = None
    while before != text:
        before = text
        text = text.strip().removesuffix(r"\\").strip()
        if text.endswith((".", ",", ";")) and not text.endswith(".."):  # 0.33... is not 0.33
            text = text[:-1]
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if (
            text.startswith(r"\text{")
            and closing(text, 5) == len(text) - 1
            and re.fullmatch(r"[-\d\s.,/()]*", text[6:-1])
        ):
            text = text[6:-1]
    return text


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; -1 when none does. Half-open intervals close either way."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return -1


def nesting(text: str) -> int:
    """How deep brackets of any kind go."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def split_top(text: str, separators: str) -> list[str]:
    """Split at single-character separators outside every bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in separators and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts]


def plain(text: str) -> str:
    r"""For comparing spellings: no spaces, no \text{}, and braces only where they hold more than one character."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_ ", text).replace(" ", "")  # 3 4 is not 34
    return re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text)
