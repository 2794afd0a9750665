"""Mappings from YAML or the command line into typed trees: unknown keys raise, with the nearest known one named."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from lens_megatron.errors import UsageError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, and no duplicate keys.

    PyYAML reads YAML 1.1, where 1e-6 is text, 04:00:00 is 14400, 010 is 8, `off` is false and 2026-01-31 a date object.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen and key_node.value != "<<":
                problem = f"duplicate key {key_node.value!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))


_Loader.yaml_implicit_resolvers = {}  # else PyYAML's own stay beside these
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d[\d_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place in words. Empty lines are left out."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, parse_json_line(line, where)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(line)
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise UsageError(f"{where}: not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{where}: expected a JSON object, found {type(tree).__name__}")
    return tree


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` set on a copy of the tree; values are read as YAML."""
    result = _deep_copy(tree)
    for override in overrides:
        path, equals, value = override.partition("=")
        *parents, last = path.split(".")
        if not equals or not all((*parents, last)):
            raise UsageError(f"override {override!r}: write it as key.path=value")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if isinstance(child, list):
                raise UsageError(f"override {override!r}: {parent} is a list; give it whole, as {parent}=[...]")
            if not isinstance(child, dict):
                # a short form such as `algorithm: lens` opens into the mapping it stands for
                opened = {"preset": child} if parent == "algorithm" and child is not None else {}
                child = node[parent] = opened
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


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Built once a type: building takes longer than using it."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def build(kind: type[T], tree: Any, where: str) -> T:
    """`tree` as a `kind` (pydantic model, or dataclass that forbids extra keys), or one clear line."""
    try:
        return _adapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(kind, problem, where) for problem in _relevant(kind, error))) from None


def to_tree(kind: type[T], value: T) -> dict[str, Any]:
    """The plain mapping that `build` would accept."""
    return _adapter(kind).dump_python(value, mode="json")


def _relevant(kind: type, error: ValidationError) -> list[Any]:
    """Without the branches of a union that the value never meant: of `str | Settings` given a mapping, `str`."""
    problems = error.errors(include_url=False)

    def meant_another_branch(loc: tuple[Any, ...]) -> bool:
        is_branch = bool(loc) and _path(kind, loc) == _path(kind, loc[:-1])
        return is_branch and any(len(p["loc"]) > len(loc) and p["loc"][: len(loc) - 1] == loc[:-1] for p in problems)

    return [problem for problem in problems if not meant_another_branch(problem["loc"])]


def _explain(kind: type, problem: Mapping[str, Any], where: str) -> str:
    keys = _path(kind, problem["loc"])
    path = ".".join(str(key) for key in keys)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(keys[-1]), _keys_at(kind, problem["loc"][:-1]), n=1)
        hint = f"; did you mean {'.'.join([*map(str, keys[:-1]), *near])!r}?" if near else ""
        return f"{where}: unknown key {path!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] in ("dataclass_type", "model_type", "dict_type"):
        message = "expected keys and values"
    if problem["type"] == "string_type" and isinstance(problem["input"], dict):
        message = "YAML reads this as keys and values: put the text in quotes of its own"
    given = "" if problem["type"] in ("missing", "value_error", "assertion_error") else f" (got {_short(problem)})"
    return f"{where}: {path + ': ' if path else ''}{message}{given}"


def _short(problem: Mapping[str, Any]) -> str:
    text = repr(problem["input"])
    return text if len(text) <= 80 else text[:77] + "..."


def _step(kind: Any, part: Any) -> tuple[Any, bool]:
    """The type that `part` of an error's location leads to from `kind`, and whether the user wrote `part`.

    Of a union, pydantic puts the name of the branch in the location, which means nothing to the user.
    """
    if typing.get_origin(kind) is typing.Annotated:
        return _step(typing.get_args(kind)[0], part)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        branches = [branch for branch in typing.get_args(kind) if branch is not type(None)]
        if len(branches) == 1:
            return _step(branches[0], part)
        named = [branch for branch in branches if getattr(branch, "__name__", None) == part or str(branch) == str(part)]
        return (named[0] if named else None), False
    if typing.get_origin(kind) in (list, tuple, set, frozenset) and isinstance(part, int):
        return typing.get_args(kind)[0], True
    if typing.get_origin(kind) in (dict, Mapping):
        return typing.get_args(kind)[1], True
    return _fields(kind).get(part), True


def _fields(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "model_fields"):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _path(kind: Any, loc: tuple[Any, ...]) -> list[Any]:
    """The location as the user wrote it."""
    path = []
    for part in loc:
        kind, written = _step(kind, part)
        if written:
            path.append(part)
    return path


def _keys_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """Names of the keys allowed at a place in the tree."""
    for part in loc:
        kind, _ = _step(kind, part)
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [name for branch in typing.get_args(kind) for name in _fields(branch)]
    return list(_fields(kind))
