"""Marks stand where their numbers say: coordinates read back from the SVG give the values."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.reporting import charts
from lens_megatron.reporting.charts import Axis, Bars, Series

finite = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


def elements(svg: str, kind: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if element.get("class") == kind]


def test_a_line_s_points() -> None:
    svg = charts.line_chart([Series("a <b>", [(1, 0.0), (2, 0.25), (3, 1.0)], 0)], "share")
    (line,) = elements(svg, "line")
    assert line.get("data-label") == "a <b>" and line.get("data-points") == "1,0 2,0.25 3,1"
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in elements(svg, "dot")]
    (left, bottom), (middle, quarter), (right, top) = dots
    assert middle == pytest.approx((left + right) / 2)
    assert bottom == charts.HEIGHT - charts.BOTTOM and top == charts.TOP
    assert bottom - quarter == pytest.approx((bottom - top) / 4, abs=0.02)


def test_long_lines_are_drawn_twice_and_thinned() -> None:
    svg = charts.line_chart([Series("a", [(step, step % 2) for step in range(2000)], 0)], "share")
    (line,) = elements(svg, "line")
    pairs = [pair.split(",") for pair in (line.get("data-points") or "").split()]
    assert len(elements(svg, "faint")) == 1 and len(pairs) <= charts.MOST_POINTS
    assert all(abs(float(y) - 0.5) < 0.02 for _, y in pairs[40:])  # the trailing mean of a zigzag
    assert len(svg) < 40_000


@given(st.lists(finite, min_size=1, max_size=50), st.integers(1, 60))
def test_smoothing_is_the_trailing_mean(values: list[float], window: int) -> None:
    smoothed = [y for _, y in charts.smooth(list(enumerate(values)), window)]
    slow = [sum(part) / len(part) for k in range(len(values)) if (part := values[max(0, k - window + 1) : k + 1])]
    assert smoothed == pytest.approx(slow, rel=1e-6, abs=1e-6)


@given(st.lists(finite, min_size=1, max_size=30))
def test_ranges_hold_all_values_and_ticks_lie_within(values: list[float]) -> None:
    low, high = charts.value_range(values)
    room = 1e-6 * (high - low)
    assert low <= min(values) + room and max(values) - room <= high and low < high
    ticks = charts.linear_ticks(low, high)
    assert 2 <= len(ticks) <= 12 and all(low - room <= tick <= high + room for tick in ticks)


def test_log_axis() -> None:
    axis = Axis(0.001, 1.0, 0, 300, log=True)
    assert [axis.pixel(value) for value in (0.001, 0.01, 1.0)] == [0, 100, 300]
    assert axis.ticks() == pytest.approx([0.001, 0.01, 0.1, 1.0])


def test_bars_are_as_high_as_their_values() -> None:
    svg = charts.bar_chart(["x", "y"], [Bars("a", [0.5, None], "red"), Bars("b", [1.0, 0.25], "blue")], "share")
    heights = {
        (bar.get("data-label"), bar.get("data-category")): float(bar.get("height", "")) for bar in elements(svg, "bar")
    }
    assert set(heights) == {("a", "x"), ("b", "x"), ("b", "y")}
    assert heights["b", "x"] == 2 * heights["a", "x"] == 4 * heights["b", "y"] > 100


def test_stacked_pieces_follow_each_other() -> None:
    svg = charts.stacked_bars(
        ["run"], [Bars("p", [2.0], "red"), Bars("q", [6.0], "blue"), Bars("none", [0.0], "x")], "s"
    )
    first, second = elements(svg, "bar")
    start = float(second.get("x", ""))
    assert float(first.get("x", "")) + float(first.get("width", "")) == pytest.approx(start - 1)
    assert float(second.get("width", "")) + 1 == pytest.approx(3 * (float(first.get("width", "")) + 1), abs=0.05)


def test_histogram_outline() -> None:
    series = [Series("a", [(0, 0.1), (2, 0.01)], 0), Series("nothing", [], 1)]
    svg = charts.step_chart(series, [0.001, 0.01, 0.1, 1.0], "score", "share")
    outline = elements(svg, "line")[0]
    assert outline.get("data-points") == "0.003162,0.1 0.3162,0.01"
    floor = charts.HEIGHT - charts.BOTTOM
    assert (outline.get("d") or "").count(f"V{floor}") == 2  # the empty bin, and the end


@pytest.mark.parametrize(
    "svg",
    [
        charts.line_chart([], "y"),
        charts.line_chart([Series("a", [], 0)], "y"),
        charts.line_chart([Series("a", [(1, -1.0)], 0)], "y", log_y=True),
        charts.bar_chart(["x"], [Bars("a", [None], "red")], "y"),
        charts.stacked_bars(["x"], [Bars("a", [None], "red")], "y"),
        charts.step_chart([], [0.1, 1.0], "x", "y"),
    ],
)
def test_no_data_is_said_not_drawn(svg: str) -> None:
    assert svg.startswith('<p class="nothing">')


@pytest.mark.parametrize("points", [[(5, 0.0)], [(5, 3.0)], [(1, -2.0), (2, -2.0)], [(1, 1e-9), (2, 1e12)]])
def test_degenerate_ranges_are_drawn(points: list[tuple[float, float]]) -> None:
    svg = charts.line_chart([Series("a", points, 0)], "y")
    assert len(elements(svg, "dot")) == len(points) and "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.1234, "0.123"), (1234.4, "1,234"), (2e-6, "2e-06"), (3e8, "3e+08"), (-0.5, "-0.5")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert charts.number(value) == text
