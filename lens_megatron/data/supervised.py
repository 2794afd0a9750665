"""Rows with a worked response, for `sft`: {"prompt", "response"}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lens_megatron.data.config import SupervisedDataConfig
from lens_megatron.data.files import read_files
from lens_megatron.data.rows import parse_rows
from lens_megatron.data.template import Template
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import named_template


@dataclass(frozen=True)
class SupervisedExample:
    id: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]  # ends with the tokenizer's end token


def load_supervised(config: SupervisedDataConfig, tokenizer: Any, template: str) -> tuple[list[SupervisedExample], int]:
    """Examples, and how many were left out for data.max_prompt_tokens. Prompt and response are tokenised apart, as the
    response of a rollout is."""
    raw = list(read_files(config.train, config.split))
    if not raw:
        raise UsageError(f"{config.train}: the data set is empty")
    key = config.response_key
    for where, columns in raw:
        if not isinstance(columns.get(key), str) or not columns[key].strip():
            raise UsageError(f"{where}: no {key!r}; supervised rows have a prompt and the response to learn")
    rows = list(parse_rows(iter(raw), config.prompt_key, key))
    prompts = Template(tokenizer, named_template(config.template, template)).encode(rows)
    responses = tokenizer([columns[key] for _, columns in raw], add_special_tokens=False)["input_ids"]
    examples = [
        SupervisedExample(row.id, prompt.tokens, (*response, tokenizer.eos_token_id))
        for row, prompt, response in zip(rows, prompts, responses, strict=True)
        if len(prompt.tokens) <= config.max_prompt_tokens
    ]
    if not examples:
        raise UsageError(
            f"{config.train}: all {len(rows)} prompts are longer than data.max_prompt_tokens={config.max_prompt_tokens}"
        )
    return examples, len(rows) - len(examples)
