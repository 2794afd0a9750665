"""Results as files, each failure one clear line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def check_writable(*paths: str | Path | None) -> None:
    """Of options that name a result, before the long work that makes it. None: not given."""
    for path in [Path(given) for given in paths if given]:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UsageError(f"{path}: its folder does not exist")
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; name a file in it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UsageError(f"{path}: cannot be written")


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """What `--json F` writes. Strict JSON: a NaN is a bug of the caller's, not a file that others cannot read."""
    _write(path, json.dumps(tree, indent=1, allow_nan=False) + "\n", f"--json {path}")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """What `--json F.jsonl` writes."""
    _write(path, "".join(json.dumps(row) + "\n" for row in rows), f"--json {path}")


def write_page(path: Path, text: str) -> None:
    """A page or a table."""
    _write(path, text, str(path))


def _write(path: Path, text: str, what: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{what}: {error.strerror}") from None


def wide_console(columns: int) -> Console:
    """For tables that would lose text if cut: at least `columns` wide, whatever the terminal or pipe says."""
    from rich.console import Console

    class PipeAware(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1; `... | head` is no failure, and cli.main knows it

    console = PipeAware(highlight=False)
    return console if console.width >= columns else PipeAware(width=columns, highlight=False)
