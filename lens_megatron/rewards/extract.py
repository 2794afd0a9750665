r"""Where the answer of a response is. Pure text work in time linear in the response; nothing is evaluated.

The last \boxed{} counts, whatever came before it. A last box that is never closed is no answer: the response was cut
off while giving it. Without any box, `anywhere` takes what follows the last "answer is" (or "answer:", "####", a heading
"Answer"), on its line or below it, else the last line, if that ends in an expression or is one.
"""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 1000

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_WITHOUT_BRACES = re.compile(r"\\(?:boxed|fbox)\b(?!\s*\{)")
# C0 controls but tab and newlines, DEL, C1, and the marks that reverse the order of what a reader sees
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# the last of them: a heading of its own line, "**Final Answer**"
_ANNOUNCED = re.compile(
    r"####|\banswer[ *]{0,4}(?:is|was|equals|:|=)[ :*]{0,4}|^[#* \t]{0,8}(?:final )?answer[* \t\r]{0,8}$",
    re.IGNORECASE | re.MULTILINE,
)
_DISPLAY = re.compile(r"\s*(?:\$\$(.{1,500}?)\$\$|\\\[(.{1,500}?)\\\])", re.DOTALL)
_BELOW = re.compile(r"[ \t*]*(?:\r?\n[ \t]*){1,3}(?=\S)")
_CONCLUSION = re.compile(
    r"(?<![<>!:=])=|:|\b(?:is|are|equals?|gets?|gives?|obtains?|yields?|has|have|total of|therefore|thus|hence|so)\b",
    re.IGNORECASE,
)
_SEVERAL_EQUATIONS = re.compile(r"=[^=]*(?:\band\b|\bor\b|[,;])[^=]*=")
_LINE_CHARS = 500  # how much of a last line may be an answer
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?:[^A-Za-z\n]+[A-Za-z]{2,}){2,}")


_ANY_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT_IN_FORMULA = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|operatorname)\s*\{[^{}]*\}")
_SENTENCE = 3  # words
_LAST_LINE_OF_A_SOLUTION = re.compile(r"(?:\A|\n)\s*####[ \t]*([^\n]*\S)\s*\Z")


def has_control_characters(response: str) -> bool:
    return _CONTROL.search(response) is not None


def boxed(response: str) -> str | None:
    """The content of the last box; "" when that is empty or was never closed; None when there is no box."""
    boxes: list[tuple[int, int, int]] = []  # start, content's start, content's end: closed and outermost
    open_braces: list[tuple[int, int] | None] = []  # (start, content's start) of a box; None for another brace
    for match in _BRACES.finditer(response):
        token = match.group()
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                start, content = opened
                while boxes and boxes[-1][0] > start:
                    boxes.pop()  # inside this one
                boxes.append((start, content, match.start()))
        elif token == "{":
            open_braces.append(None)
        elif token[-1] == "{" and len(token) > 2:
            open_braces.append((match.start(), match.end()))
    last_open = max((opened[0] for opened in open_braces if opened is not None), default=-1)
    last_bare = max((match.start() for match in _BOX_WITHOUT_BRACES.finditer(response)), default=-1)
    last_closed = boxes[-1][0] if boxes else -1
    if max(last_open, last_bare, last_closed) < 0:
        return None
    if last_closed < max(last_open, last_bare):
        return ""
    _, start, end = boxes[-1]
    return _without_inner_boxes(response[start:end].strip()) if end - start <= MAX_ANSWER_CHARS else response[start:end]


def _without_inner_boxes(content: str) -> str:
    return re.sub(r"\\(?:boxed|fbox)\s*\{", "{", content)


def final_answer(response: str, answer_in: str = "anywhere", cut: bool = False) -> str:
    """The text of the answer; "" when the response gives none. `cut`: it ran into the length limit, so that its last line is
    no conclusion, and what stands there may be half of a number."""
    content = boxed(response)
    if content is not None or answer_in == "boxed":
        return (content or "").strip()
    if cut:
        response = response.rpartition("\n")[0]
    last = None
    for match in _ANNOUNCED.finditer(response):
        last = match
    if last is not None and (announced := _announced(response[last.end() : last.end() + MAX_ANSWER_CHARS])) is not None:
        return announced
    if cut:
        return ""
    last_line = response.rstrip()[-_LINE_CHARS:].rpartition("\n")[2]
    whole = _bare(last_line)
    if len(response.strip()) <= _LINE_CHARS and "\n" not in response.strip() and not _PROSE.search(whole):
        return whole
    conclusions = list(_CONCLUSION.finditer(last_line))
    if not conclusions or _SEVERAL_EQUATIONS.search(last_line):
        return ""
    return _bare(last_line[conclusions[-1].end() :])


def golden_answer(text: str) -> str:
    """What the answer of a row says. It may be a whole solution: GSM8K ends with a line "#### 72", MATH has one box in prose.
    Boxes among symbols (`$\\boxed{2}$ or $\\boxed{3}$`, `\\boxed{50}\\%`) are part of an answer."""
    if found := _LAST_LINE_OF_A_SOLUTION.search(text):
        return found[1]
    if len(_ANY_BOX.findall(text)) == 1 and words_outside_formulas(text) >= _SENTENCE:
        return boxed(text) or text
    return text


def words_outside_formulas(text: str) -> int:
    return len(_WORD.findall(_TEXT_IN_FORMULA.sub(" ", text)))


def _announced(text: str) -> str | None:
    """On the same line or below it, in a display or not; None when what stands below is a solution and no answer."""
    if display := _DISPLAY.match(text):
        return _bare((display[1] or display[2]).strip())
    below = _BELOW.match(text)
    line = text[below.end() if below else 0 :].partition("\n")[0]
    if below is not None and _PROSE.search(line):
        return None
    return _bare(_without_reason(line))


_FORMULA_AND_REASON = re.compile(r"\s*\$([^$]{1,500})\$\s*[,;.:]?\s+([A-Za-z ,.']*)")
_CHANGES_THE_ANSWER = re.compile(
    r"\b(?:or|and|not|but|wrong|incorrect|no|except|if|unless|never|times|plus|minus|than)\b"
)


def _without_reason(announced: str) -> str:
    """`$5$, since the other root is negative` is $5$: words after a formula go, unless they may change it."""
    match = _FORMULA_AND_REASON.fullmatch(announced)
    if match is None or _CHANGES_THE_ANSWER.search(match[2].lower()) or len(match[2].split()) < 3:
        return announced
    return match[1]


def _bare(text: str) -> str:
    """Without Markdown, dollar signs around it and the full stop of its sentence."""
    text = text.strip().strip("*`").strip()
    sentence = re.match(r"(.*?[^\s.])[.!]\s+[A-Z(]", text)
    if sentence is not None and "$" not in sentence.group(1).replace("$", "", 2):
        text = sentence.group(1)
    while len(text) > 1 and text[-1] in ".!,;*` " and not text.endswith(".."):
        text = text[:-1]
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : -len(right)]
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and "$" not in inner:
            text = inner.strip().rstrip(".,")
    return text
