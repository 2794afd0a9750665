"""What our sources must not contain: ways for a file from elsewhere to run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("lens_megatron", "checkpoints_tools", "launchers") for p in (ROOT / folder).rglob("*.py")]


def weaknesses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {"dill", "shelve", "marshal", "joblib"} & set(names):
                yield f"line {node.lineno}: {names}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only"
        if called in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "os.system", "eval", "exec"):
            yield f"line {node.lineno}: {called}"
        if "trust_remote_code" in given and given["trust_remote_code"] != "False":
            yield f"line {node.lineno}: trust_remote_code"
        if given.get("shell") == "True":
            yield f"line {node.lineno}: a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_from_elsewhere_can_run_code(path: Path) -> None:
    assert list(weaknesses(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(b)",
        "run(c, shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_finds_them(line: str) -> None:
    assert len(list(weaknesses(ast.parse(line)))) == 1
