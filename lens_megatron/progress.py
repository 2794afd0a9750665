"""What a running training shows on stderr, and how long each phase of a step took.

On a terminal: one bar with the phase, reward, zero-reward ratio, tokens/s and the time left.  Elsewhere (a job's log):
one line a step.  Ranks other than 0 pass shown=False: times only.
"""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.spinner import Spinner
from rich.table import Column
from rich.text import Text

_RECENT_STEPS = 20  # for the time left: early steps are slower than later ones


@dataclass
class Timer:
    seconds: float = 0.0  # of this phase, once it has ended


class _Summary(ProgressColumn):
    """The one that gives way where the terminal is narrow, by its end."""

    def get_table_column(self) -> Column:
        return Column(no_wrap=False)

    def render(self, task: Task) -> Text:
        return Text(task.fields["summary"], no_wrap=True, overflow="ellipsis")


class Progress:
    """with Progress(steps, start) as progress:
    with progress.phase("score"): ...
    metrics |= progress.times()     # time/score, ..., time/step
    progress.finish_step(metrics)

    `start`: steps done before, by the run that is resumed.
    """

    def __init__(self, total_steps: int, start: int = 0, shown: bool = True, file: IO[str] | None = None) -> None:
        self.done, self.total = start, total_steps
        self._shown = shown
        self._console = Console(file=file, stderr=file is None, highlight=False, soft_wrap=True)
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._summary = ""

    def __enter__(self) -> Progress:
        if self._shown and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                TextColumn("[bold]{task.fields[phase]:<8}[/]"),
                _Summary(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self.total, completed=self.done, phase="", summary="")
            self._bar.start()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        if error is None and self.done >= self.total:  # else it shows in which phase it ended
            self._bar.update(self._task, phase="done")
        self._bar.stop()

    @contextmanager
    def starting(self, what: str) -> Iterator[None]:
        """Before the first step: a line, which on a terminal goes when the work is done."""
        if not self._shown:
            yield
        elif self._console.is_terminal:
            # what is printed to stdout may go to a file
            with Live(Spinner("dots", what), console=self._console, transient=True, redirect_stdout=False):
                yield
        else:
            self.note(f"starting: {what}")
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[Timer]:
        """Wall seconds, added to what the phase already took in this step. On a GPU, where kernels run on after the
        call, the phase that waits for them gets their time."""
        timer = Timer()
        began = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, phase=name)
        try:
            yield timer
        finally:
            timer.seconds = time.perf_counter() - began
            self._seconds[name] = self._seconds.get(name, 0.0) + timer.seconds

    def times(self) -> dict[str, float]:
        """time/NAME of the phases since the last finished step, and time/step since then."""
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return times | {"time/step": time.perf_counter() - self._began}

    def begin_step(self) -> None:
        """What was measured since the last finished step belongs to no step."""
        self._seconds.clear()
        self._began = time.perf_counter()

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._began
        self.done += 1
        self._recent.append(seconds)
        self.begin_step()
        self._summary = self._describe(metrics, metrics.get("time/step", seconds))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, phase="", summary=self._summary)
        elif self._shown:
            ended = "  done" if self.done >= self.total else ""
            self._console.print(f"step {self.done}/{self.total}  {self._summary}{ended}", markup=False)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._shown:
            self._console.print(text, markup=False)

    def _describe(self, metrics: Mapping[str, float], seconds: float) -> str:
        shown = {
            label: f"{metrics[name]:.3f}"
            for name, label in (("reward", "reward"), ("success", "success"), ("zero_reward_ratio", "zero-reward"))
            if metrics.get(name) is not None
        }
        if not shown and metrics.get("loss") is not None:  # supervised training
            shown["loss"] = f"{metrics['loss']:.4f}"
        if shown.get("reward") == shown.get("success"):  # rewards of 0 and 1: the line has to fit a terminal
            shown.pop("success", None)
        left = (self.total - self.done) * sum(self._recent) / len(self._recent)
        parts = [f"{duration(left)} left"] if self.done < self.total else []  # first: a narrow terminal cuts the end
        parts += [f"{label} {value}" for label, value in shown.items()]
        parts.append(f"{seconds:.1f} s")
        if metrics.get("tokens") and seconds > 0:
            parts.append(f"{metrics['tokens'] / seconds:,.0f} tokens/s")
        return "  ".join(parts)


def closing_line(run_dir: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What a whole run came to, and where to look at it. `metrics`: of its steps."""
    last = metrics[-1]
    parts = [f"done: {last['step']} step{'s' if last['step'] > 1 else ''} in {run_dir}"]
    if last.get("reward") is not None:
        parts.append(f"reward {last['reward']:.3f}")
    if (evaluation := _evaluation(metrics)) is not None:
        parts.append(evaluation)
    return f"{', '.join(parts)}; see it: lens-megatron report {shlex.quote(run_dir)}"


def evaluation_line(step: int, metrics: Mapping[str, Any]) -> str:
    """Accuracies of the benchmarks after `step`, with standard errors where there are any."""
    parts = []
    for name, value in _accuracies(metrics).items():
        error = metrics.get(f"{name}/standard_error")
        parts.append(f"{name[5:]} {value:.3f}{'' if error is None else f' ± {error:.3f}'}")
    return f"evaluation {'before training' if step == 0 else f'after step {step}'}: {', '.join(parts)}"


def _evaluation(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """The last one's average; of a single benchmark its own, which has no other."""
    for line in reversed(metrics):
        if scores := _accuracies(line):
            name = "eval/average" if "eval/average" in scores else next(iter(scores))
            return f"{name} {scores[name]:.3f}"
    return None


def _accuracies(line: Mapping[str, Any]) -> dict[str, float]:
    """eval/NAME, and not eval/NAME/truncated_ratio."""
    names = (name for name in line if name.startswith("eval/") and name.count("/") == 1)
    return {name: line[name] for name in names if line[name] is not None}


def duration(seconds: float) -> str:
    """3 d 4 h, 2 h 05 m, 3 m 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} m"
    return f"{whole // 60} m {whole % 60:02} s" if whole >= 60 else f"{whole} s"
