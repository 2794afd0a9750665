"""The study's figures as SVG files of their own: lines with bands, in the colours of the reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lens_megatron.reporting import charts

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 56, 16, 30, 44
LEGEND_LINE = 18
LETTER_WIDTH = 7  # of the legend, about


@dataclass(frozen=True)
class Line:
    """(x, y, low, high) points; a band where low and high differ. `place`: of its colour; None: its place in the figure."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    place: int | None = None


def colours() -> list[str]:
    """--s0 ... of the report's page, for light paper."""
    css = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    first = css.partition("--s0")[2].partition("\n")[0]
    return re.findall(r"#[0-9a-f]{6}", first)


def figure(lines: Sequence[Line], title: str, x_label: str, from_zero: bool = True) -> str:
    lines = [line for line in lines if line.points]
    paint = colours()
    legend_width = max([150, *(36 + LETTER_WIDTH * len(line.label) for line in lines)])
    a_row = (WIDTH - LEFT + RIGHT) // legend_width
    rows = -(-len(lines) // a_row)
    height = HEIGHT + rows * LEGEND_LINE
    if not lines:
        return _svg(height, title, ['<text x="20" y="60" class="tick">no run has these values yet</text>'])
    xs = [x for line in lines for x, *_ in line.points]
    # what starts from zero is a share: an interval that goes on below it is cut there
    ys = [max(0.0, y) if from_zero else y for line in lines for _, *values in line.points for y in values]
    low, high = charts.value_range([*ys, 0.0] if from_zero else ys)
    x_axis = charts.Axis(min(xs), max(max(xs), min(xs) + 1), LEFT, WIDTH - RIGHT)
    y_axis = charts.Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.pixel(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y + 4}">{charts.number(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis.pixel(tick)
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x}" y="{HEIGHT - BOTTOM + 18}">{charts.number(tick)}</text>'
        )
    parts.append(f'<text class="tick" text-anchor="middle" x="{WIDTH / 2}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    for place, line in enumerate(lines):
        tone = place if line.place is None else line.place
        colour = paint[tone % len(paint)]
        dash = ' stroke-dasharray="6 4"' if tone >= len(paint) else ""
        upper = [f"{x_axis.pixel(x)},{y_axis.pixel(h)}" for x, _, _, h in line.points]
        lower = [f"{x_axis.pixel(x)},{y_axis.pixel(max(lo, low))}" for x, _, lo, _ in reversed(line.points)]
        if any(lo != hi for _, _, lo, hi in line.points):
            parts.append(f'<polygon fill="{colour}" opacity="0.13" points="{" ".join([*upper, *lower])}"/>')
        route = " ".join(f"{x_axis.pixel(x)},{y_axis.pixel(y)}" for x, y, _, _ in line.points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2"{dash} points="{route}"/>')
        x, y = LEFT + (place % a_row) * legend_width, HEIGHT + (place // a_row) * LEGEND_LINE + 4
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"{dash}/>')
        parts.append(f'<text class="tick" x="{x + 24}" y="{y + 4}">{escape(line.label)}</text>')
    return _svg(height, title, parts)


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    style = ".tick{font:12px sans-serif;fill:#444}.title{font:bold 14px sans-serif;fill:#222}.grid{stroke:#e4e4e4}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{style}</style>"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/><text class="title" x="12" y="19">{escape(title)}</text>'
        + "\n".join(parts)
        + "</svg>\n"
    )
