"""Which template a model's prompts get: what was given, what its folder notes, what its tokenizer has, the problem alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lens_megatron.errors import UsageError
from lens_megatron.folder_note import NOTE, note_bytes, noted_template
from lens_megatron.mcore.hf_companions import companions_of
from lens_megatron.model_spec import (
    load_model_config,
    load_model_spec,
    named_template,
    shipped_models,
    template_origin,
    to_hf_config,
)

SUM = '{problem} = \u2028"é\\boxed{}"\n'  # what JSON has to bring back


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(load_model_spec("tiny-qwen3"), "float32")))
    return tmp_path


def found(folder: Path) -> tuple[str, str]:
    config = load_model_config(folder)
    return config.template, config.template_from


def test_a_folders_own_note_stands_above_what_can_be_guessed(folder: Path) -> None:
    assert noted_template(folder) is None
    assert found(folder) == ("{problem}", "the problem alone")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert found(folder) == ("chat", "the tokenizer's chat template")
    (folder / NOTE).write_bytes(note_bytes(SUM))
    assert found(folder) == (SUM, "lens_megatron.json of the model's folder")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("template: x", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "template: "),
        ('{"template": 3}', "template: "),
        ('{"template": "no place for it"}', r"hold \{problem\} exactly once \(got 'no place for it'\)"),
        ('{"template": "chat", "tempalte": "chat"}', "unknown key 'tempalte'; did you mean 'template'"),
    ],
)
def test_a_note_that_says_something_else_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / NOTE).write_text(content)
    with pytest.raises(UsageError, match=rf"lens_megatron\.json: .*{reason}") as refused:
        load_model_config(folder)
    assert "\n" not in str(refused.value)


def test_the_note_travels_with_the_folder_and_is_the_writers(folder: Path) -> None:
    assert NOTE not in companions_of(folder, None)
    assert companions_of(folder, None, "chat")[NOTE] == note_bytes("chat")
    (folder / NOTE).write_bytes(note_bytes(SUM))
    assert companions_of(folder, None)[NOTE] == note_bytes(SUM)
    assert companions_of(folder, None, "chat")[NOTE] == note_bytes("chat")


def test_a_shipped_models_template_by_its_name() -> None:
    shipped = load_model_config("qwen3-8b-base")
    assert shipped.template_from == "shipped with qwen3-8b-base"
    assert named_template("qwen3-8b-base", "chat") == shipped.template
    assert named_template(SUM, "chat") == SUM
    assert named_template(None, "chat") == "chat"
    assert template_origin("data.template", "qwen3-8b-base", "x") == "data.template, shipped with qwen3-8b-base"
    assert template_origin("data.template", SUM, "x") == "data.template"
    assert template_origin("data.template", None, "x") == "x"
    assert not {"chat"} & set(shipped_models())  # a model of that name would hide the tokenizer's template
