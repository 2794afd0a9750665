"""A data set of prompts, tokenised, filtered by length and counted, in a resumable order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lens_megatron.data.config import DataConfig
from lens_megatron.data.order import PromptOrder
from lens_megatron.data.rows import Row, read_rows
from lens_megatron.data.template import Template
from lens_megatron.errors import UsageError
from lens_megatron.model_spec import named_template
from lens_megatron.types import Prompt

_TOKENISE_AT_ONCE = 1024
_SHOWN = 80  # characters of a prompt, so that its line is hardly longer than two of a terminal


@dataclass(frozen=True)
class LoadedPrompts:
    prompts: list[Prompt]
    too_long: int  # rows left out for data.max_prompt_tokens
    systems_dropped: int  # rows whose system message a {problem} template has no place for


def load_prompts(config: DataConfig, tokenizer: Any, model_template: str) -> LoadedPrompts:
    """Every usable row of data.train. `model_template` is the model's, which data.template overrides."""
    rows = read_rows(config.train, config.split, config.prompt_key, config.answer_key)
    template = Template(tokenizer, named_template(config.template, model_template))
    prompts = encode_prompts(rows, template)
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= config.max_prompt_tokens]
    if not kept:
        shortest = min(len(prompt.tokens) for prompt in prompts)
        raise UsageError(
            f"{config.train}: all {len(rows)} prompts are longer than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} (the shortest has {shortest})"
        )
    dropped = 0 if template.keeps_system else sum(row.messages[0].role == "system" for row in rows)
    return LoadedPrompts(kept, len(prompts) - len(kept), dropped)


def encode_prompts(rows: Sequence[Row], template: Template) -> list[Prompt]:
    prompts = []
    for start in range(0, len(rows), _TOKENISE_AT_ONCE):
        some = rows[start : start + _TOKENISE_AT_ONCE]
        for row, encoded in zip(some, template.encode(some), strict=True):
            question = (encoded.question, row.answer, row.source, encoded.text)
            prompts.append(Prompt(row.id, encoded.tokens, *question, planted=encoded.planted))
    return prompts


def first_prompt(tokenizer: Any, tokens: Sequence[int], origin: str) -> str:
    """A line: what the model reads, special tokens and line breaks visible. `origin`: who says that this is the template."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if len(text) > _SHOWN:  # both ends are the template's
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return f"first prompt: {text!r} (template: {origin})"


class PromptStream:
    """Batches of prompts without end."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        self._prompts = list(prompts)
        self._order = PromptOrder([_identity(prompt) for prompt in prompts], seed, shuffle)

    def first(self, count: int) -> list[Prompt]:
        """In the order of the file, without drawing them."""
        return self._prompts[:count]

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def epoch(self) -> int:
        return self._order.epoch

    def take(self, count: int) -> list[Prompt]:
        return [self._prompts[index] for index in self._order.take(count)]

    def checksum(self) -> int:
        """Of this epoch's prompts in their order: 48 bits, which a number in metrics.jsonl holds exactly."""
        return int(self._order.checksum()[:12], 16)

    def state_dict(self) -> dict[str, Any]:
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state)


def _identity(prompt: Prompt) -> str:
    """Id and content: a resumed run must find the same prompts, not only the same names."""
    content = hashlib.blake2b(repr((prompt.tokens, prompt.question, prompt.answer)).encode(), digest_size=8)
    return f"{prompt.id}/{content.hexdigest()}"
