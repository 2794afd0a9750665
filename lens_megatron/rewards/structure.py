r"""What an answer is made of: a list, a set, a tuple or interval, a matrix, a union, an inequality, or one expression.

Works on cleaned LaTeX (latex.clean). Only the expressions at the leaves are ever given to a parser of mathematics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lens_megatron.rewards.latex import closing, split_top

MAX_PARTS = 64
MAX_DEPTH = 8


@dataclass(frozen=True)
class Leaf:
    text: str


@dataclass(frozen=True)
class Parts:
    """list: commas, in any order.  set: braces, in any order, once each.  ordered: a tuple, or an interval's two ends."""

    kind: Literal["list", "set", "ordered", "union"]
    items: tuple[Node, ...]
    brackets: str = ""  # of an ordered one: "()", "[)", ...


@dataclass(frozen=True)
class Grid:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Named:
    """x = 3, f(x) = x + 1, x in [0, 1): a value and what it is the value of."""

    name: str
    value: Node


Node = Leaf | Parts | Grid | Named

_GRID = re.compile(r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}(.*)\\end\s*\{\1\}", re.DOTALL)
_JOINED = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_NAME = r"(?:\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|\w))?(?:\(\s*\\?[A-Za-z]+\s*\))?)"
_EQUATION = re.compile(rf"\s*({_NAME})\s*=\s*([^=<>]+)", re.DOTALL)
_MEMBER = re.compile(rf"\s*({_NAME})\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
_RELATION = re.compile(r"(\\leq(?![A-Za-z])|\\geq(?![A-Za-z])|<|>)")
_BUILDER = re.compile(rf"\s*({_NAME})\s*(?:\\in\s*\\mathbb\s*\{{?\s*R\s*\}}?\s*)?(?:\||:)(.+)", re.DOTALL)
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_(?:\{\w+\}|\w))?")
_THOUSANDS = re.compile(
    r"[+-]?\s*[$€£¥]?\s*\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s*(?:[%°]|[A-Za-z]+|\\text\s*\{[^{}]*\})(?:\^\s*\{?\d\}?)?)?"
)
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")


def read_structure(text: str, depth: int = 0) -> Node:
    text = text.strip()
    if depth > MAX_DEPTH:
        return Leaf(text)
    if _THOUSANDS.fullmatch(text) and depth == 0:
        return Leaf(text)
    parts = split_top(_JOINED.sub(",", text), ",;")
    if len(parts) > 1:
        if len(parts) > MAX_PARTS or not all(parts):
            return Leaf(text)
        return _flat_list([read_structure(part, depth + 1) for part in parts])
    return (
        _grid(text, depth)
        or _union(text, depth)
        or _bracketed(text, depth)
        or _equation(text, depth)
        or _inequality(text)
        or _plus_minus(text, depth)
        or Leaf(text)
    )


def _flat_list(nodes: list[Node]) -> Parts:
    items: list[Node] = []
    for node in nodes:
        items += node.items if isinstance(node, Parts) and node.kind == "list" else [node]
    return Parts("list", tuple(items))


def _grid(text: str, depth: int) -> Node | None:
    match = _GRID.fullmatch(text)
    if match is None or r"\begin" in match[2]:
        return None
    body = re.sub(r"^\s*\{[clr|\s]*\}", "", match[2]) if match[1] == "array" else match[2]
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    cells = tuple(tuple(read_structure(cell, depth + 1) for cell in row.split("&")) for row in rows)
    return Grid(cells) if len(cells) <= MAX_PARTS else None


def _union(text: str, depth: int) -> Node | None:
    parts = split_top(re.sub(r"\\cup(?![A-Za-z])", "\x02", text), "\x02")
    if len(parts) < 2 or not all(parts):
        return None
    return Parts("union", tuple(read_structure(part, depth + 1) for part in parts))


def _equation(text: str, depth: int) -> Node | None:
    match = _EQUATION.fullmatch(text) or _MEMBER.fullmatch(text)
    return Named(re.sub(r"\s+", "", match[1]), read_structure(match[2], depth + 1)) if match else None


def _inequality(text: str) -> Node | None:
    """a <= x < b, x > a and their mirror images as intervals."""
    pieces = _RELATION.split(text)
    if len(pieces) not in (3, 5):
        return None
    terms, relations = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    if len(terms) == 3:
        if not _VARIABLE.fullmatch(terms[1]) or not (terms[0] and terms[2]):
            return None
        rising = [relation in ("<", r"\leq") for relation in relations]
        if rising[0] != rising[1]:
            return None
        if not rising[0]:
            terms, relations = terms[::-1], relations[::-1]
        brackets = ("[" if "eq" in relations[0] else "(") + ("]" if "eq" in relations[1] else ")")
        return Named(terms[1], Parts("ordered", (Leaf(terms[0]), Leaf(terms[2])), brackets))
    left, right = terms
    relation = relations[0]
    if not (left and right):
        return None
    if not _VARIABLE.fullmatch(left) and _VARIABLE.fullmatch(right):
        left, right = right, left
        relation = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}[relation]
    if not _VARIABLE.fullmatch(left) or _VARIABLE.fullmatch(right):
        return None
    closed = "eq" in relation
    if relation in (">", r"\geq"):
        return Named(left, Parts("ordered", (Leaf(right), Leaf(r"\infty")), ("[" if closed else "(") + ")"))
    return Named(left, Parts("ordered", (Leaf(r"-\infty"), Leaf(right)), "(" + ("]" if closed else ")")))


def _bracketed(text: str, depth: int) -> Node | None:
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2]
        if r"\{" in inside:
            return None
        builder = _BUILDER.fullmatch(inside)
        if builder is not None:
            interval = _inequality(builder[2])
            return interval.value if isinstance(interval, Named) and interval.name == builder[1].strip() else None
        items = [_inner(part, depth) for part in split_top(inside, ",;")] if inside.strip() else []
        return (
            Parts("set", tuple(item for node in items for item in _members(node))) if len(items) <= MAX_PARTS else None
        )
    if text[:1] in "([" and text[-1:] in ")]" and text and closing(text, 0) == len(text) - 1:
        parts = split_top(text[1:-1], ",;")
        if len(parts) == 1:
            return read_structure(parts[0], depth + 1) if text[0] == "(" and text[-1] == ")" else None
        if len(parts) > MAX_PARTS or not all(parts):
            return None
        return Parts("ordered", tuple(_inner(part, depth) for part in parts), text[0] + text[-1])
    return None


def _inner(text: str, depth: int) -> Node:
    """Inside brackets a comma separates: 312,123 are two numbers, not 312 thousand."""
    return read_structure(text, depth + 1)


def _members(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Parts) and node.kind == "list" else (node,)


def _plus_minus(text: str, depth: int) -> Node | None:
    if not _PLUS_MINUS.search(text):
        return None
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return Parts("list", (Leaf(upper.strip()), Leaf(lower.strip())))
