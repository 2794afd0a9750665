"""Answers on disk, one JSON object a line, each written when it is judged: a killed evaluation loses none of them.

The first line says what made them (weights, template, sampling). Answers of another making are never mixed in. One that
is judged again is written again: the last line of a question counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lens_megatron import strict
from lens_megatron.errors import RunError, UsageError
from lens_megatron.evaluation.answering import Answer
from lens_megatron.files import append_line, take_lock

Key = tuple[str, str, int, str]


class AnswerFile:
    """`answers`: those there already, by key. One process at a time."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self.answers: dict[Key, Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b", buffering=0)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}; choose another --out") from None
        try:
            if not take_lock(self._file):
                raise UsageError(f"{path} is being written by another evaluation; choose another --out")
            self._read(json.loads(json.dumps(dict(made_by))))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, answer: Answer) -> None:
        self._write(asdict(answer))
        self.answers[answer.key] = answer

    def _write(self, tree: Mapping[str, Any]) -> None:
        try:
            append_line(self._file, json.dumps(tree).encode() + b"\n")
        except OSError as error:
            raise RunError(
                f"writing {self.path}: {error.strerror}; earlier answers are whole: make room, then run the same again"
            ) from None

    def _read(self, made_by: Any) -> None:
        self._file.seek(0)
        content = self._file.readall()  # type: ignore[attr-defined]
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote the last line
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write({"made_by": made_by})
            return
        earlier = self._parsed(1, lines[0]).get("made_by")
        if earlier != made_by:
            raise UsageError(
                f"{self.path} holds answers of another evaluation ({_difference(earlier, made_by)}): choose another --out, "
                "or remove it"
            )
        for number, line in enumerate(lines[1:], 2):
            tree = self._parsed(number, line)
            try:
                answer = Answer(**tree)
            except TypeError as error:
                raise UsageError(f"{self.path}:{number}: not an answer ({error})") from None
            self.answers[answer.key] = answer

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            return strict.parse_json_line(line, f"{self.path}:{number}")
        except UsageError as error:
            raise UsageError(f"{error}; remove that line") from None


def _difference(earlier: Any, now: Any) -> str:
    if not isinstance(earlier, dict):
        return "it has no first line that says which"
    keys = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
    return ", ".join(f"{key} was {earlier.get(key)!r}, is {now.get(key)!r}" for key in keys)
