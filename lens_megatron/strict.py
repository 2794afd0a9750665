"""Mappings from YAML or the command line into typed trees: unknown keys raise, with the nearest known one named."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from lens_megatron.errors import UsageError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-6 is a number, which YAML 1.1 reads as text) and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf)|\.(nan|NaN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"{where}{line}: {problem}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected keys and values at the top, found {type(tree).__name__}")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` set on a copy of the tree; values are read as YAML."""
    result = _deep_copy(tree)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise UsageError(f"override {override!r}: write it as key.path=value")
        node = result
        *parents, last = path.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                # a short form such as `algorithm: lens` opens into the mapping it stands for
                child = node[parent] = {"preset": child} if parent == "algorithm" else {}
            node = child
        node[last] = parse_yaml(value, f"override {override!r}")
    return result


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`change` on top of `base`, mappings merged key by key."""
    result = _deep_copy(base)
    for key, value in change.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def _deep_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def build(kind: type[T], tree: Any, where: str) -> T:
    """`tree` as a `kind` (pydantic model, or dataclass with `__pydantic_config__ = STRICT`), or one clear line."""
    try:
        return _adapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(kind, problem, where) for problem in error.errors())) from None


def to_tree(kind: type[T], value: T) -> dict[str, Any]:
    """The plain mapping that `build` would accept."""
    return _adapter(kind).dump_python(value, mode="json")


def _explain(kind: type, problem: Mapping[str, Any], where: str) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        name = str(problem["loc"][-1])
        near = difflib.get_close_matches(name, _fields_at(kind, problem["loc"][:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key {path!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
    return f"{where}: {path + ': ' if path else ''}{message}{given}"


def _fields_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """Names of the keys allowed at a place in the tree."""
    candidates = [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        candidates = list(typing.get_args(kind))
    names: list[str] = []
    for candidate in candidates:
        if not isinstance(candidate, type):
            continue
        hints: dict[str, Any] = {}
        if hasattr(candidate, "model_fields"):
            hints = {name: field.annotation for name, field in candidate.model_fields.items()}
        elif dataclasses.is_dataclass(candidate):
            hints = typing.get_type_hints(candidate)
        if not loc:
            names += hints
        elif loc[0] in hints:
            names += _fields_at(hints[loc[0]], loc[1:])
    return names
