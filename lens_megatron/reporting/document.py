"""An HTML page of sections, complete in itself: style, script and data inside, nothing fetched.

What models wrote is hostile text. On a page it is data: JSON in a script element that is never run, with every `<`
escaped, put into the page as text. The content policy allows no other script than the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def html_document(
    title: str,
    heading: str,
    about: str,
    sections: Sequence[tuple[str, str, str]],
    data: tuple[str, Any],
    footer: str,
    legend: str = "",
    scripts: Sequence[str] = ("page.js",),
) -> str:
    """`sections`: (name of the anchor, title, content as HTML). `data`: id of the element that holds it, and the tree."""
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in scripts)
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    links = "".join(f'<a href="#{name}">{title_}</a>' for name, title_, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title_}</h2>{content}</section>' for name, title_, content in sections)
    data_id, tree = data
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<title>{escape(title)}</title>
<style>{style}</style></head><body>
<header><div><h1>{escape(heading)}</h1>
<p class="soft">{escape(about.format(made=made))}</p>
{legend}</div></header>
<nav><div>{links}</div></nav>
<main>{body}</main>
<footer>{escape(footer)}</footer>
<script type="application/json" id="{data_id}">{embedded_json(tree)}</script>
<script>{script}</script>
</body></html>
"""


def embedded_json(tree: Any) -> str:
    """JSON that cannot end its script element, open a comment, or be anything else but JSON."""
    return json.dumps(tree, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
