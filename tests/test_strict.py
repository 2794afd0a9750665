"""YAML and overrides into typed trees: what is read, what is refused, and what the one line says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron import strict
from lens_megatron.errors import UsageError

_STRICT: dict[str, Any] = {"extra": "forbid"}
QUICK = settings(deadline=None, max_examples=60)


@dataclass(frozen=True)
class Loss:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    clip: float = 0.2
    ratio: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ValueError(f"clip must be above 0 (got {self.clip})")


@dataclass(frozen=True)
class Algorithm:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    preset: str
    loss: Loss = field(default_factory=Loss)


@dataclass(frozen=True)
class Server:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    tp: int = 1


@dataclass(frozen=True)
class Run:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    model: str
    lr: float = 1e-6
    steps: int = 10
    algorithm: str | Algorithm = "lens"
    servers: tuple[Server, ...] = ()
    sites: dict[str, Server] = field(default_factory=dict)
    reference: Server | None = None


def refused(tree: Any) -> str:
    with pytest.raises(UsageError) as caught:
        strict.build(Run, tree, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_tree_and_back() -> None:
    tree = {"model": "m", "algorithm": {"preset": "lens", "loss": {"clip": 0.3}}, "servers": [{"tp": 2}]}
    run = strict.build(Run, tree, "run.yaml")
    assert run == Run("m", algorithm=Algorithm("lens", Loss(0.3)), servers=(Server(2),))
    assert strict.build(Run, strict.to_tree(Run, run), "again") == run


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": "m", "stepz": 3}, "run.yaml: unknown key 'stepz'; did you mean 'steps'?"),
        ({"model": "m", "qqqq": 3}, "run.yaml: unknown key 'qqqq'"),
        ({"model": "m", "__pydantic_confi__": 3}, "run.yaml: unknown key '__pydantic_confi__'"),
        (
            {"model": "m", "algorithm": {"preset": "lens", "loss": {"clipp": 1}}},
            "run.yaml: unknown key 'algorithm.loss.clipp'; did you mean 'algorithm.loss.clip'?",
        ),
        (
            {"model": "m", "servers": [{}, {"tpp": 1}]},
            "run.yaml: unknown key 'servers.1.tpp'; did you mean 'servers.1.tp'?",
        ),
        ({"model": "m", "sites": {"a": {"tpp": 1}}}, "run.yaml: unknown key 'sites.a.tpp'; did you mean 'sites.a.tp'?"),
        (
            {"model": "m", "reference": {"tpp": 1}},
            "run.yaml: unknown key 'reference.tpp'; did you mean 'reference.tp'?",
        ),
        ({}, "run.yaml: model: Field required"),
        ({"model": "m", "servers": [3]}, "run.yaml: servers.0: expected keys and values (got 3)"),
        ([1], "run.yaml: expected keys and values (got [1])"),
        (
            {"model": "m", "algorithm": {"preset": "lens", "loss": {"clip": -1}}},
            "run.yaml: algorithm.loss: clip must be above 0 (got -1.0)",
        ),
    ],
)
def test_the_one_line(tree: Any, message: str) -> None:
    assert refused(tree) == message


def test_wrong_types_name_the_key_and_what_was_given() -> None:
    assert refused({"model": "m", "steps": "many"}).startswith("run.yaml: steps: ")
    assert "'many'" in refused({"model": "m", "steps": "many"})
    assert "1.5" in refused({"model": "m", "steps": 1.5})
    choice = refused({"model": "m", "algorithm": {"preset": "lens", "loss": {"ratio": "toekn"}}})
    assert choice.startswith("run.yaml: algorithm.loss.ratio: ")
    assert "'token' or 'sequence'" in choice
    long = refused({"model": "m", "steps": "x" * 500})
    assert len(long) < 250


def test_text_that_is_yaml_wants_quotes() -> None:
    @dataclass(frozen=True)
    class Settings:
        template: str = ""

    for words in ("template={problem}", "template=Problem: {problem}"):
        with pytest.raises(UsageError, match=r"eval: template: YAML reads this .* quotes of its own"):
            strict.build(Settings, strict.apply_overrides({}, [words]), "eval")
    assert (
        strict.build(Settings, strict.apply_overrides({}, ["template='Problem: {problem}'"]), "eval").template
        == "Problem: {problem}"
    )


def test_several_mistakes_are_all_named() -> None:
    message = refused({"stepz": 1, "lrr": 2})
    assert [word in message for word in ("stepz", "lrr", "model")] == [True] * 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("-1.5e-3", -1.5e-3),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", 10),
        ("08", 8),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("off", "off"),
        ("no", "no"),
        ("04:00:00", "04:00:00"),
        ("2026-01-31", "2026-01-31"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("'1e-6'", "1e-6"),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    read = strict.parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


@QUICK
@given(st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none())
def test_what_python_prints_is_read_back(value: float | int | bool | None) -> None:
    text = {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else repr(value)
    text = text.replace("inf", ".inf")
    read = strict.parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


printable = st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cc", "Cs", "Cn", "Zl", "Zp"))


@QUICK
@given(st.text(printable))
def test_quoted_text_stays_text(text: str) -> None:
    assert strict.parse_yaml(f"key: {json.dumps(text, ensure_ascii=False)}", "x") == {"key": text}


@QUICK
@given(st.from_regex(r"[A-Za-z][A-Za-z0-9_./-]{0,9}", fullmatch=True))
def test_a_bare_word_stays_a_word(word: str) -> None:
    """Names, paths, dates and versions: of all words only these three, in three spellings each, are values."""
    if word.lower() not in ("true", "false", "null"):
        assert strict.parse_yaml(f"key: {word}", "x") == {"key": word}


def test_duplicate_keys_are_refused_with_their_line() -> None:
    with pytest.raises(UsageError, match=r"run\.yaml:3: duplicate key 'a'"):
        strict.parse_yaml("a: 1\nb: 2\na: 3\n", "run.yaml")
    with pytest.raises(UsageError, match=r"x:1: duplicate key 'b'"):
        strict.parse_yaml("a: {b: 1, b: 2}", "x")
    assert strict.parse_yaml("a: {b: 1}\nc: {b: 2}", "x") == {"a": {"b": 1}, "c": {"b": 2}}


def test_anchors_and_merge_keys() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\n"
    assert strict.parse_yaml(text, "x")["more"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "{[1]: 2}", "? {a: 1}\n: 2", "!!python/object:os.x {}", "\x00"])
def test_broken_yaml_is_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^run\.yaml") as caught:
        strict.parse_yaml(text, "run.yaml")
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with pytest.raises(UsageError, match="No such file"):
        strict.read_yaml(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="not UTF-8"):
        strict.read_yaml(file)
    file.write_text("- 1\n")
    with pytest.raises(UsageError, match="expected keys and values at the top, found list"):
        strict.read_yaml(file)
    file.write_text("# nothing yet\n")
    assert strict.read_yaml(file) == {}
    with pytest.raises(UsageError, match="directory"):
        strict.read_yaml(tmp_path)


def test_overrides() -> None:
    tree = {"a": {"b": 1, "c": 2}, "list": [1], "none": None}
    changed = strict.apply_overrides(tree, ["a.b=1e-6", "new.deep.key=[1, 2]", "none.x=y", "list=[3]", "s=a=b", "e="])
    assert changed == {
        "a": {"b": 1e-6, "c": 2},
        "new": {"deep": {"key": [1, 2]}},
        "none": {"x": "y"},
        "list": [3],
        "s": "a=b",
        "e": None,
    }
    assert tree == {"a": {"b": 1, "c": 2}, "list": [1], "none": None}  # untouched


def test_overriding_inside_a_short_form_keeps_what_it_stands_for() -> None:
    changed = strict.apply_overrides({"algorithm": "lens"}, ["algorithm.loss.clip=0.3"])
    assert changed == {"algorithm": {"preset": "lens", "loss": {"clip": 0.3}}}
    assert strict.apply_overrides({"algorithm": None}, ["algorithm.loss=x"]) == {"algorithm": {"loss": "x"}}


@pytest.mark.parametrize("override", ["a", "=1", ".a=1", "a.=1", "a..b=1", "list.0=1", "a={", ""])
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(UsageError) as caught:
        strict.apply_overrides({"a": {}, "list": [1]}, [override])
    assert repr(override) in str(caught.value)


trees = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@QUICK
@given(mappings, mappings, mappings)
def test_merge_laws(one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]) -> None:
    assert strict.merge(one, {}) == one
    assert strict.merge({}, one) == one
    assert strict.merge(one, one) == one
    assert strict.merge(strict.merge(one, two), two) == strict.merge(one, two)
    merged = strict.merge(one, two)
    assert set(merged) == {*one, *two}
    for key in two:
        if not (isinstance(one.get(key), dict) and isinstance(two[key], dict)):
            assert merged[key] == two[key]


def test_merge_copies() -> None:
    base = {"a": {"b": 1}}
    strict.merge(base, {"a": {"b": 2}})["a"]["b"] = 3
    assert base == {"a": {"b": 1}}
