"""Plots as inline SVG: lines, bars, stacked bars, histograms. Colours are CSS variables of the page, for light and dark.

Every mark carries its numbers (data-*) and a title; the page's script reads data-points for its hover line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 26, 40
MOST_POINTS = 400  # of a line: more cannot be seen, and the page stays small
MARKED_POINTS = 30  # up to here each point gets a dot


@dataclass(frozen=True)
class Series:
    """colour: number of a CSS variable --sN."""

    label: str
    points: Sequence[Point]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Bars:
    """One bar for each category; None: nothing to show there. `css`: a colour of its own."""

    label: str
    values: Sequence[float | None]
    css: str


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    log: bool = False

    def pixel(self, value: float) -> float:
        if self.log:
            share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        if not self.log:
            return linear_ticks(self.low, self.high)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        every = max(1, math.ceil((last - first) / 6))
        return [10.0**power for power in range(first, last + 1, every)]


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    step = nice_step((high - low) / about)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9)))


def value_range(values: Iterable[float]) -> tuple[float, float]:
    """Widened to whole ticks; from 0 unless the values lie far from it."""
    values = list(values)
    low, high = min(values), max(values)
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if high < 0 and high > 0.6 * low:
        high = 0.0
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = (0.0 if low == 0 else low - room), high + room
    step = nice_step((high - low) / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def number(value: float) -> str:
    """For people: 0.123, 12.3, 1,234, 1.2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Means of runs of neighbours, at most `most` of them."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[len(part) // 2][0], sum(y for _, y in part) / len(part)) for part in parts]


def smoothing_window(points: int) -> int:
    return max(1, points // 20) if points > MARKED_POINTS else 1


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the `window` points up to and with each."""
    total, smoothed = 0.0, []
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        smoothed.append((x, total / min(i + 1, window)))
    return smoothed


def line_chart(
    series: Sequence[Series], y_label: str, x_label: str = "step", log_y: bool = False, from_zero: bool = False
) -> str:
    """Long series: faint as they are, and strong as a trailing mean."""
    drawn = [(one, points) for one in series if (points := [(x, y) for x, y in one.points if not log_y or y > 0])]
    if not drawn:
        return nothing("no values to draw")
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_axis = _x_axis(min(xs) if x_label == "step" else 0.0, max(xs))
    low, high = (min(ys), max(ys)) if log_y else value_range([*ys, 0.0] if from_zero else ys)
    if log_y:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)
        high = high if high > low else low * 10
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log_y)
    marks = [_line(one, points, x_axis, y_axis) for one, points in drawn]
    return _frame("line", y_label, x_label, x_axis, y_axis, marks)


def step_chart(series: Sequence[Series], edges: Sequence[float], x_label: str, y_label: str) -> str:
    """Histograms on logarithmic axes as outlines: a series' points are (bin, share of bin), `edges` one more than bins."""
    shares = [share for one in series for _, share in one.points if share > 0]
    if not shares:
        return nothing("no values to draw")
    x_axis = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT, log=True)
    y_axis = Axis(10.0 ** math.floor(math.log10(min(shares)) - 1e-9), 1.0, HEIGHT - BOTTOM, TOP, log=True)
    bins = list(pairwise(edges))
    marks = []
    for one in series:
        share_of = {round(place): share for place, share in one.points if share > 0}
        route = f"M{x_axis.start} {y_axis.start}"
        for place, (_, right) in enumerate(bins):
            top = y_axis.pixel(share_of[place]) if place in share_of else y_axis.start
            route += f"V{top}H{x_axis.pixel(right)}"
        centres = {place: math.sqrt(bins[place][0] * bins[place][1]) for place in share_of}
        data = " ".join(f"{centres[place]:.4g},{share:.6g}" for place, share in sorted(share_of.items()))
        marks.append(_path(f"{route}V{y_axis.start}", one, data))
    return _frame("step", y_label, x_label, x_axis, y_axis, marks)


def bar_chart(categories: Sequence[str], bars: Sequence[Bars], y_label: str, at_least: float = 0.0) -> str:
    """Groups of bars, one group a category. at_least: what the axis reaches, so that plots can be compared."""
    values = [value for one in bars for value in one.values if value is not None]
    if not values:
        return nothing("no values to draw")
    _, high = value_range([0.0, at_least, *values])
    y_axis = Axis(0.0, high, HEIGHT - BOTTOM, TOP)
    group = (WIDTH - LEFT - RIGHT) / len(categories)
    width = min(36.0, 0.8 * group / len(bars))
    marks = []
    for place, category in enumerate(categories):
        middle = LEFT + (place + 0.5) * group
        marks.append(f'<text class="tick" x="{middle:.1f}" y="{y_axis.start + 16}">{_cut(category, group)}</text>')
        for k, one in enumerate(bars):
            value = one.values[place]
            if value is None:
                continue
            x = middle + (k - len(bars) / 2) * width
            top = y_axis.pixel(value)
            title = f"{category} · {one.label}: {number(value)}" if one.label else f"{category}: {number(value)}"
            marks.append(
                f'<rect class="bar" data-category="{escape(category)}" data-label="{escape(one.label)}" '
                f'data-value="{value:.6g}" x="{x + 1:.1f}" y="{top}" width="{width - 2:.1f}" '
                f'height="{max(0.0, y_axis.start - top):.2f}" style="fill:{one.css}"><title>{escape(title)}</title></rect>'
            )
            if width >= 26:
                marks.append(f'<text class="value" x="{x + width / 2:.1f}" y="{top - 4}">{number(value)}</text>')
    return _frame("bar", y_label, "", None, y_axis, marks)


def stacked_bars(rows: Sequence[str], parts: Sequence[Bars], x_label: str) -> str:
    """One horizontal bar a row; `parts` are its pieces, values by row."""
    totals = [sum(part.values[row] or 0.0 for part in parts) for row in range(len(rows))]
    if not any(totals):
        return nothing("no times were recorded")
    _, high = value_range([0.0, *totals])
    axis = Axis(0.0, high, 10, WIDTH - 56)
    thick, pitch, marks = 18, 44, []
    bottom = 8 + pitch * len(rows)
    for tick in axis.ticks():
        x = axis.pixel(tick)
        marks.append(f'<line class="grid" x1="{x}" x2="{x}" y1="8" y2="{bottom}"/>')
        marks.append(f'<text class="tick" x="{x}" y="{bottom + 16}">{number(tick)}</text>')
    for row, name in enumerate(rows):
        y, left = 24 + pitch * row, 0.0
        marks.append(f'<text class="row" x="10" y="{y - 5}">{_cut(name, WIDTH - 20)}</text>')
        for part in parts:
            value = part.values[row] or 0.0
            if value <= 0:
                continue
            start, end = axis.pixel(left), axis.pixel(left + value)
            title = f"{name} · {part.label}: {number(value)} s ({value / totals[row]:.0%})"
            marks.append(
                f'<rect class="bar" data-category="{escape(name)}" data-label="{escape(part.label)}" '
                f'data-value="{value:.6g}" x="{start}" y="{y}" width="{max(0.5, end - start - 1):.2f}" '
                f'height="{thick}" style="fill:{part.css}"><title>{escape(title)}</title></rect>'
            )
            left += value
        marks.append(f'<text class="value left" x="{axis.pixel(left) + 5}" y="{y + 13}">{number(totals[row])}</text>')
    height = bottom + 38
    marks.append(f'<text class="label" x="{(axis.start + axis.end) / 2}" y="{height - 6}">{escape(x_label)}</text>')
    return _svg("stacked", x_label, height, marks)


def nothing(why: str) -> str:
    """In a plot's place, never an empty one."""
    return f'<p class="nothing">{escape(why)}</p>'


def _x_axis(low: float, high: float) -> Axis:
    room = 0.5 if low == high else 0.0
    return Axis(low - room, high + room, LEFT + 4, WIDTH - RIGHT)


def _line(one: Series, points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    points = sorted(points)
    window = smoothing_window(len(points))
    raw, strong = thin(points), thin(smooth(points, window))
    marks = ""
    if window > 1:
        marks += f'<path class="faint" d="{_route(raw, x_axis, y_axis)}" style="stroke:var(--s{one.colour})"/>'
    marks += _path(_route(strong, x_axis, y_axis), one, " ".join(f"{x:g},{y:.6g}" for x, y in strong))
    if len(points) <= MARKED_POINTS:
        for x, y in points:
            title = escape(f"{one.label} · {number(x)}: {number(y)}")
            marks += (
                f'<circle class="dot" cx="{x_axis.pixel(x)}" cy="{y_axis.pixel(y)}" r="3" '
                f'style="fill:var(--s{one.colour})"><title>{title}</title></circle>'
            )
    return marks


def _route(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    return "M" + "L".join(f"{x_axis.pixel(x)} {y_axis.pixel(y)}" for x, y in points)


def _path(route: str, one: Series, data: str) -> str:
    dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
    return (
        f'<path class="line" data-label="{escape(one.label)}" data-points="{data}" d="{route}"{dashes} '
        f'style="stroke:var(--s{one.colour})"><title>{escape(one.label)}</title></path>'
    )


def _frame(kind: str, y_label: str, x_label: str, x_axis: Axis | None, y_axis: Axis, marks: Iterable[str]) -> str:
    grid = [f'<text class="label start" x="4" y="13">{escape(y_label)}</text>']
    for tick in y_axis.ticks():
        y = y_axis.pixel(tick)
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        grid.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4}">{_tick(tick, y_axis)}</text>')
    grid.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_axis.start}" y2="{y_axis.start}"/>')
    scale = ""
    if x_axis is not None:
        ticks = x_axis.ticks()
        if x_label == "step":
            ticks = [tick for tick in ticks if float(tick).is_integer()]
        for tick in ticks:
            x = x_axis.pixel(tick)
            grid.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{y_axis.start}" y2="{y_axis.start + 4}"/>')
            grid.append(f'<text class="tick" x="{x}" y="{y_axis.start + 17}">{_tick(tick, x_axis)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        grid.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
        scale = (
            f' data-low="{x_axis.low:g}" data-high="{x_axis.high:g}" data-start="{x_axis.start}" '
            f'data-end="{x_axis.end}" data-log="{int(x_axis.log)}" data-unit="{escape(x_label)}"'
        )
    return _svg(kind, y_label, HEIGHT, [*grid, *marks], scale)


def _tick(value: float, axis: Axis) -> str:
    if not axis.log:
        return number(value)
    power = round(math.log10(value))
    return number(value) if -2 <= power <= 3 else f'10<tspan dy="-4" font-size="75%">{power}</tspan>'


def _svg(kind: str, label: str, height: float, marks: Iterable[str], attributes: str = "") -> str:
    return (
        f'<svg class="chart" data-kind="{kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(label)}"{attributes}>{"".join(marks)}</svg>'
    )


def _cut(text: str, pixels: float) -> str:
    """Text that fits, by the mean width of a letter; the whole of it in a title."""
    most = max(3, int(pixels / 6.2))
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return escape(shown) + (f"<title>{escape(text)}</title>" if shown != text else "")
