"""A row as the model reads it: rendered by a template, tokenised, with the span of the user's own question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from lens_megatron.data.rows import Row
from lens_megatron.errors import UsageError

CHAT = "chat"
SLOT = "{problem}"
# Stands in for the question while the chat template's own text is found: nobody's question, and nothing to escape.
_PLACEHOLDER = "Zq7question7qZ"
# Some chat templates write the day: a run that goes on tomorrow, and its evaluation, must have the same prompts. Llama 3's own
# choice where it is told none.
_TODAY = date(2024, 7, 26)


@dataclass(frozen=True)
class Rendered:
    text: str
    start: int  # of the question, in characters
    end: int


@dataclass(frozen=True)
class Encoded:
    tokens: tuple[int, ...]
    question: tuple[int, int]  # half-open, in tokens
    text: str  # the question
    planted: tuple[int, ...] = ()  # positions of tokens that hold planted noise


class Template:
    """`chat`: the tokenizer's chat template over the row's messages, which writes its special tokens itself. Else a text with
    {problem}, which is the whole prompt but for the token that the tokenizer begins every text with, if it does: once."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(f"{tokenizer.name_or_path}: a fast tokenizer is needed (tokenizer.json is missing)")
        if template == CHAT and not tokenizer.chat_template:
            raise UsageError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; set data.template")
        if template != CHAT and template.count(SLOT) != 1:
            raise UsageError(
                f"data.template: {SLOT} once, {CHAT!r} or the name of a shipped model (lens-megatron models) is needed "
                f"(got {template!r})"
            )
        self._tokenizer, self._chat = tokenizer, template == CHAT
        self._before, self._after = (SLOT if self._chat else template).split(SLOT)
        begins = _first_token(tokenizer)
        if not self._chat and not self._before.startswith(begins):
            self._before = begins + self._before

    @property
    def keeps_system(self) -> bool:
        return self._chat

    def render(self, row: Row) -> Rendered:
        if self._chat:
            return self._in_chat(row)
        if sum(message.role == "user" for message in row.messages) > 1:
            raise UsageError(f"{row.where}: several turns fit a chat template only; set data.template=chat")
        start = len(self._before)
        return Rendered(self._before + row.question + self._after, start, start + len(row.question))

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        rendered = [self.render(row) for row in rows]
        batch = self._tokenizer([r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True)
        result = []
        for row, r, ids, offsets in zip(rows, rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
            span = question_span(r, offsets)
            if span[0] == span[1]:
                raise UsageError(f"{row.where}: no token of the question stands on its own ({row.question[:40]!r})")
            result.append(Encoded(tuple(ids), span, row.question, planted_tokens(row, r, offsets)))
        return result

    def _in_chat(self, row: Row) -> Rendered:
        text = self._apply(row, row.question)
        # the template around the question, found with a question that occurs nowhere else
        before, found, after = self._apply(row, _PLACEHOLDER).partition(_PLACEHOLDER)
        if found and text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return Rendered(text, len(before), len(text) - len(after))
        raise UsageError(f"{row.where}: the chat template changes with the question, whose place cannot be told")

    def _apply(self, row: Row, question: str) -> str:
        messages = [{"role": m.role, "content": m.content} for m in row.messages[:-1]]
        messages.append({"role": "user", "content": question})
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, strftime_now=_TODAY.strftime
        )


def _first_token(tokenizer: Any) -> str:
    """What the tokenizer puts before every text: Llama's is part of what such a model was trained on, Qwen has none."""
    first: list[int] = tokenizer("x")["input_ids"][:1]
    return tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""


def planted_tokens(row: Row, rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens that share a character with a span of planted noise."""
    if not row.planted:
        return ()
    trimmed = row.question.find(rendered.text[rendered.start : rendered.end])  # chat templates strip spaces
    if trimmed < 0:
        raise UsageError(f"{row.where}: 'planted' cannot be placed: the template rewrites the question")
    spans = [(rendered.start - trimmed + start, rendered.start - trimmed + end) for start, end in row.planted]
    return tuple(i for i, (a, b) in enumerate(offsets) if any(a < end and start < b for start, end in spans))


def question_span(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens made of the question alone. The first may carry the template's space before it, as words do in BPE."""
    text, start, end = rendered.text, rendered.start, rendered.end
    while start > 0 and text[start - 1] == " ":
        start -= 1
    inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end and b > rendered.start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
