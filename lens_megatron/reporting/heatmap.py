"""A prompt with its interference scores as a heat map, deleted tokens struck out: for the terminal and for a page."""

from __future__ import annotations

import html
from collections.abc import Sequence

# From no colour to red, as shares of the prompt's highest score.
_TERMINAL_STEPS = ((0.75, "on red"), (0.5, "on dark_orange3"), (0.25, "on yellow4"), (0.1, "on grey23"))


def terminal_heatmap(tokens: Sequence[str], scores: Sequence[float | None], deleted: Sequence[int]) -> str:
    """rich markup."""
    from rich.markup import escape

    gone = set(deleted)
    parts = []
    for place, (token, share) in enumerate(zip(tokens, score_shares(scores), strict=True)):
        style = next((style for least, style in _TERMINAL_STEPS if share >= least), "")
        if place in gone:
            style = f"{style} strike bold".strip()
        text = escape(token)
        parts.append(f"[{style}]{text}[/]" if style else text)
    return "".join(parts)


def score_shares(scores: Sequence[float | None]) -> list[float]:
    """How strongly each token is coloured: its score as a share of the prompt's highest."""
    highest = max((score for score in scores if score is not None), default=0.0)
    return [score / highest if score and highest > 0 else 0.0 for score in scores]


def html_heatmap(tokens: Sequence[str], scores: Sequence[float | None], deleted: Sequence[int]) -> str:
    """One <p>: each token a span, its score in the tooltip."""
    gone = set(deleted)
    spans = []
    for place, (token, score, share) in enumerate(zip(tokens, scores, score_shares(scores), strict=True)):
        title = "no score: nothing predicts the first token" if score is None else f"{score:.4g}"
        text = html.escape(token).replace("\n", "&crarr;<br>")
        tag = "del" if place in gone else "span"
        spans.append(f'<{tag} style="background:rgba(214,39,40,{share:.3f})" title="{title}">{text}</{tag}>')
    return '<p class="heatmap">' + "".join(spans) + "</p>"


def heatmap_page(prompts: Sequence[tuple[Sequence[str], Sequence[float | None], Sequence[int]]], caption: str) -> str:
    """A page of its own, readable without a network."""
    body = "\n".join(html_heatmap(tokens, scores, deleted) for tokens, scores, deleted in prompts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Interference scores</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
.heatmap {{ font-family: ui-monospace, monospace; white-space: pre-wrap; border: 1px solid #ddd; border-radius: 6px;
  padding: 1rem; }}
del {{ text-decoration-thickness: 2px; }}
</style></head><body>
<h1>Interference scores</h1>
<p>{html.escape(caption)}</p>
{body}
</body></html>
"""
