"""What an evaluation shows on stderr while it generates: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lens_megatron.evaluation.answering import Answer
from lens_megatron.progress import duration

_LINE_SECONDS = 30.0


class AnswerProgress:
    """with AnswerProgress("Qwen3-8B", done=100, total=3432) as progress: progress.add(answer)"""

    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._before, self._total = name, done, total
        self._new = self._tokens = self._right = 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = self._said = time.monotonic()

    def __enter__(self) -> AnswerProgress:
        if self._before:
            self._console.print(
                f"{self._name}: {self._before:,} of {self._total:,} answers are there already", markup=False
            )
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(self._name, markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[summary]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._before, summary="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._new:
            self._say()

    def add(self, answer: Answer) -> None:
        self._new += 1
        self._tokens += answer.tokens
        self._right += answer.right
        if self._bar is not None:
            self._bar.update(self._task, completed=self._before + self._new, summary=self._summary())
        elif time.monotonic() - self._said > _LINE_SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        done = f"{self._before + self._new:,}/{self._total:,} answers"
        self._console.print(f"{self._name}: {done}  {self._summary()}", markup=False)

    def _summary(self) -> str:
        seconds = time.monotonic() - self._began
        left = (self._total - self._before - self._new) * seconds / self._new
        rate = f"{self._tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
        return f"{self._right} right of {self._new}  {rate}  {duration(left)} left"
