"""Results as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """What `--json F` writes. Strict JSON: a NaN is a bug of the caller's, not a file that others cannot read."""
    text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from None


def wide_console(columns: int) -> Console:
    """For tables that would lose text if cut: at least `columns` wide, whatever the terminal or pipe says."""
    from rich.console import Console

    class PipeAware(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1; `... | head` is no failure, and cli.main knows it

    console = PipeAware(highlight=False)
    return console if console.width >= columns else PipeAware(width=columns, highlight=False)
