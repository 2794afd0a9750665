"""The heat map's colours, struck-out tokens, and text that is markup to nobody."""

from __future__ import annotations

import re

import pytest
from rich.text import Text

from lens_megatron.reporting.heatmap import heatmap_page, html_heatmap, score_shares, terminal_heatmap


def test_shares_of_the_highest_score() -> None:
    assert score_shares([None, 0.5, 2.0, 0.0]) == [0.0, 0.25, 1.0, 0.0]
    assert score_shares([None, 0.0]) == [0.0, 0.0]
    assert score_shares([]) == []


def test_html() -> None:
    text = html_heatmap(["<b>", " x\n", "y"], [None, 1.0, 0.5], [2])
    assert re.findall(
        r"<(span|del) style=\"background:rgba\(214,39,40,([\d.]+)\)\" title=\"(.*?)\">(.*?)</\1>", text
    ) == [
        ("span", "0.000", "no score: nothing predicts the first token", "&lt;b&gt;"),
        ("span", "1.000", "1", " x&crarr;<br>"),
        ("del", "0.500", "0.5", "y"),
    ]
    assert "<h1>Interference scores</h1>" in heatmap_page([(["a"], [0.1], [])], "1 < 2") and "1 &lt; 2" in heatmap_page(
        [], "1 < 2"
    )


def test_terminal() -> None:
    text = Text.from_markup(terminal_heatmap(["[bold]", " b", "c"], [None, 1.0, 0.3], [1]))
    assert text.plain == "[bold] bc"
    styles = {text.plain[span.start : span.end]: set(str(span.style).split()) for span in text.spans}
    assert styles == {" b": {"bold", "strike", "on", "red"}, "c": {"on", "yellow4"}}


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        html_heatmap(["a", "b"], [0.1], [])
