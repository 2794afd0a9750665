"""algorithms/ and purification/ stay small and import nothing but torch, jaxtyping, the standard library and our types."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lens_megatron"
FILES = sorted([*(PACKAGE / "algorithms").glob("*.py"), *(PACKAGE / "purification").glob("*.py")])
OURS = ("lens_megatron.types", "lens_megatron.algorithms", "lens_megatron.purification")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_and_size(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            assert top in ("torch", "jaxtyping") or top in sys.stdlib_module_names or name.startswith(OURS), name
