"""Rows with a worked response, for `sft`: {"prompt", "response"}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lens_megatron.data.files import read_files
from lens_megatron.data.rows import parse_rows
from lens_megatron.data.template import Template
from lens_megatron.errors import UsageError


@dataclass(frozen=True)
class SupervisedExample:
    id: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]  # ends with the tokenizer's end token


def load_supervised(source: str, tokenizer: Any, template: str, split: str = "train") -> list[SupervisedExample]:
    """Prompt and response are tokenised apart, as the response of a rollout is."""
    raw = list(read_files(source, split))
    if not raw:
        raise UsageError(f"{source}: the data set is empty")
    for where, columns in raw:
        if not isinstance(columns.get("response"), str) or not columns["response"].strip():
            raise UsageError(f"{where}: no 'response'; supervised rows have a prompt and the response to learn")
    rows = list(parse_rows(iter(raw), "prompt", "response"))
    prompts = Template(tokenizer, template).encode(rows)
    responses = tokenizer([columns["response"] for _, columns in raw], add_special_tokens=False)["input_ids"]
    return [
        SupervisedExample(row.id, prompt.tokens, (*response, tokenizer.eos_token_id))
        for row, prompt, response in zip(rows, prompts, responses, strict=True)
    ]
