"""Rows of the two schemas, ours and verl's, checked and brought to one form.

Ours: {"prompt": text or chat messages, "answer": text or number, "source"?, "id"?, "planted"?}.
verl's: {"prompt": chat messages, "reward_model": {"ground_truth"}, "data_source"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron.data.files import RawRow, read_files
from lens_megatron.errors import UsageError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Row:
    id: str
    messages: tuple[Message, ...]  # the last one is the user's
    answer: str
    source: str
    where: str  # file and line, for errors
    # half-open spans of noise in the question, in characters, where it is known
    planted: tuple[tuple[int, int], ...] = ()

    @property
    def question(self) -> str:
        return self.messages[-1].content


def read_rows(source: str, split: str = "train", prompt_key: str = "prompt", answer_key: str = "answer") -> list[Row]:
    """Every row of a data set, or the first thing that is wrong with it."""
    rows = list(parse_rows(read_files(source, split), prompt_key, answer_key))
    if not rows:
        raise UsageError(f"{source}: the data set is empty")
    return rows


def parse_rows(raw: Iterator[RawRow], prompt_key: str, answer_key: str) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for where, columns in raw:
        row = parse_row(where, columns, prompt_key, answer_key)
        if row.id in seen:
            raise UsageError(f"{where}: id {row.id!r} was already used at {seen[row.id]}")
        seen[row.id] = where
        yield row


def parse_row(where: str, columns: dict[str, Any], prompt_key: str = "prompt", answer_key: str = "answer") -> Row:
    source = columns.get("source") or columns.get("data_source") or ""
    row_id = columns.get("id")
    messages = _messages(where, columns, prompt_key)
    return Row(
        id=_default_id(where) if row_id is None else str(row_id),
        messages=messages,
        answer=_answer(where, columns, answer_key),
        source=str(source),
        where=where,
        planted=_planted(where, columns.get("planted"), messages[-1].content),
    )


def _default_id(where: str) -> str:
    """prompts/12 for line 12 of prompts.jsonl."""
    path, separator, number = where.rpartition(" row ") if " row " in where else where.rpartition(":")
    return f"{Path(path).stem}/{number}" if separator else where


def _messages(where: str, columns: dict[str, Any], key: str) -> tuple[Message, ...]:
    prompt = columns.get(key)
    if prompt is None:
        raise UsageError(
            f"{where}: no {key!r}; it has {_names(columns)} (another name: data.prompt_key of a run; elsewhere rename it)"
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise UsageError(f"{where}: {key!r} should be text or a list of chat messages")
    messages = []
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UsageError(f"{where}: message {i} of {key!r} should have a role and a text as content")
        if message.get("role") not in ROLES:
            raise UsageError(f"{where}: message {i} of {key!r} has role {message.get('role')!r}, not one of {ROLES}")
        messages.append(Message(message["role"], message["content"]))
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise UsageError(f"{where}: {key!r} should end with a question of the user")
    return tuple(messages)


def _planted(where: str, spans: Any, question: str) -> tuple[tuple[int, int], ...]:
    """Noise that was put into a prompt on purpose, as studies do: what a deletion should find."""
    if spans is None:
        return ()
    found = []
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and len(span) == 2 and all(type(number) is int for number in span)
        if not whole or not 0 <= span[0] < span[1] <= len(question):
            raise UsageError(
                f"{where}: 'planted' should list [start, end] of characters in the question (got {span!r})"
            )
        found.append((span[0], span[1]))
    return tuple(found)


def _answer(where: str, columns: dict[str, Any], key: str) -> str:
    answer = columns.get(key)
    name = repr(key)
    reward_model = columns.get("reward_model")
    if answer is None and isinstance(reward_model, dict):
        answer, name = reward_model.get("ground_truth"), "'reward_model.ground_truth'"
    if answer is None:
        raise UsageError(f"{where}: no answer: {name} is missing; it has {_names(columns)} (data.answer_key names it)")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise UsageError(f"{where}: {name} should be text or a number, found {type(answer).__name__}")
    if not str(answer).strip():
        raise UsageError(f"{where}: {name} is empty")
    return str(answer)


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "no columns"
