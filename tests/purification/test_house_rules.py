"""The pure core stays pure: what algorithms/ and purification/ may import, and how long a file may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lens_megatron

PACKAGE = Path(lens_megatron.__file__).parent
FILES = sorted([*PACKAGE.glob("algorithms/**/*.py"), *PACKAGE.glob("purification/**/*.py")])
OURS = {
    "algorithms": (
        "lens_megatron.types",
        "lens_megatron.algorithms",
        "lens_megatron.purification",
        "lens_megatron.own_functions",  # of the standard library alone
    ),
    "purification": ("lens_megatron.types", "lens_megatron.purification"),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_and_length(path: Path) -> None:
    allowed = OURS[path.relative_to(PACKAGE).parts[0]]
    for name in imports(path):
        root = name.partition(".")[0]
        assert root in sys.stdlib_module_names | {"torch", "jaxtyping"} or name.startswith(allowed), name
    assert len(path.read_text().splitlines()) <= 300


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 10
