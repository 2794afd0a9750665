"""The page around the sections: one file, no network, and no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from lens_megatron import __version__

_HERE = Path(__file__).parent


def html_page(
    title: str,
    what: str,
    about: str,
    key: str,
    sections: Sequence[tuple[str, str, str]],
    footer: str,
    rollouts: Any = None,
) -> str:
    """`sections`: (id, heading, HTML). `rollouts`: what the browser of rollouts shows."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{content}</section>' for name, heading, content in sections)
    data = (
        ""
        if rollouts is None
        else f'<script type="application/json" id="rollouts">{embedded_json(rollouts)}</script>\n'
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<title>{escape(title)}: {escape(what.lower())}</title>
<style>{style}</style></head><body>
<header><div><h1>{escape(title)}</h1>
<p class="soft">{escape(what)} by lens-megatron {__version__}, {made}. {escape(about)}</p>
{key}</div></header>
<nav><div>{links}</div></nav>
<main>{body}</main>
<footer>{escape(footer)}</footer>
{data}<script>{script}</script>
</body></html>
"""


def embedded_json(tree: Any) -> str:
    """JSON that cannot end its script element, open a comment, or be anything else but JSON."""
    return json.dumps(tree, allow_nan=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def grid(parts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'
