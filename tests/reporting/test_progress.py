"""Progress: the phases' seconds are right, a log gets a line a step, a terminal a bar, and other ranks nothing."""

from __future__ import annotations

import io
import time

import pytest
from rich.text import Text

from lens_megatron.progress import Progress, closing_line, duration, evaluation_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_times_of_phases(clock: list[float]) -> None:
    with Progress(2, shown=False) as progress:
        with progress.phase("score") as timer:
            clock[0] += 2
        assert timer.seconds == 2
        with progress.phase("train"):
            clock[0] += 3
        clock[0] += 1
        with progress.phase("score"):
            clock[0] += 4
        assert progress.times() == {"time/score": 6, "time/train": 3, "time/step": 10}
        progress.finish_step({})
        clock[0] += 5
        assert progress.times() == {"time/step": 5}


def test_a_phase_that_fails_is_timed_too(clock: list[float]) -> None:
    with Progress(1, shown=False) as progress:
        with pytest.raises(KeyError), progress.phase("generate"):
            clock[0] += 7
            raise KeyError
        assert progress.times()["time/generate"] == 7


def test_a_log_gets_a_line_a_step(clock: list[float]) -> None:
    log = io.StringIO()
    with Progress(10, start=6, file=log) as progress:
        for seconds in (10, 20):
            with progress.phase("train"):
                clock[0] += seconds
            metrics = {"reward": 0.25, "success": 0.5, "zero_reward_ratio": 0.125, "tokens": 30_000}
            progress.finish_step(metrics | progress.times())
        progress.note("[bold]checkpoint[/]")
    assert log.getvalue().splitlines() == [
        "step 7/10  30 s left  reward 0.250  success 0.500  zero-reward 0.125  10.0 s  3,000 tokens/s",
        "step 8/10  30 s left  reward 0.250  success 0.500  zero-reward 0.125  20.0 s  1,500 tokens/s",  # 2 x 15 s
        "[bold]checkpoint[/]",
    ]


def test_the_last_step_and_missing_numbers(clock: list[float]) -> None:
    log = io.StringIO()
    with Progress(1, file=log) as progress:
        clock[0] += 1
        progress.finish_step({"reward": 1.0})
    assert log.getvalue() == "step 1/1  reward 1.000  1.0 s  done\n"


def test_supervised_training_shows_its_loss(clock: list[float]) -> None:
    log = io.StringIO()
    with Progress(1, file=log) as progress:
        clock[0] += 2
        progress.finish_step({"loss": 0.12345, "tokens": 100})
    assert log.getvalue() == "step 1/1  loss 0.1235  2.0 s  50 tokens/s  done\n"


def test_an_evaluation_has_a_line() -> None:
    metrics = {
        "eval/gsm8k": 0.5,
        "eval/gsm8k/standard_error": 0.0125,
        "eval/gsm8k/truncated_ratio": 0.1,
        "eval/amc23": 0.25,
        "eval/average": 0.375,
    }
    assert evaluation_line(20, metrics) == "evaluation after step 20: gsm8k 0.500 ± 0.013, amc23 0.250, average 0.375"
    assert evaluation_line(0, {"eval/gsm8k": 1.0}) == "evaluation before training: gsm8k 1.000"


def test_the_start_is_a_line_in_a_log_and_passes_on_a_terminal() -> None:
    log, terminal, nothing = io.StringIO(), Terminal(), Terminal()
    for file, shown in ((log, True), (terminal, True), (nothing, False)):
        progress = Progress(3, shown=shown, file=file)
        with progress.starting("load the policy"):
            pass
        with progress, progress.phase("train"):
            pass
    assert log.getvalue() == "starting: load the policy\n"
    assert "load the policy" in terminal.getvalue()
    assert nothing.getvalue() == ""
    shown, _, then = terminal.getvalue().partition("load the policy\n")
    assert shown and then.startswith(("\x1b[1A\x1b[2K", "\x1b[?25h\r\x1b[1A\x1b[2K")), "the line is wiped"


def test_a_terminal_gets_a_bar_and_other_ranks_nothing() -> None:
    terminal, nothing = Terminal(), Terminal()
    for file, shown in ((terminal, True), (nothing, False)):
        with Progress(3, start=1, shown=shown, file=file) as progress:
            with progress.phase("generate"):
                pass
            progress.finish_step({"reward": 0.5, "tokens": 10})
            progress.note("saved")
    assert nothing.getvalue() == ""
    assert "step 2/3" in terminal.getvalue() and "reward 0.500" in terminal.getvalue()
    assert "saved" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12 s"), (59.6, "1 m 00 s"), (200, "3 m 20 s"), (7500, "2 h 05 m"), (273_600, "3 d 4 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_narrow_terminal_cuts_the_summary_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    terminal = Terminal()
    progress = Progress(50, file=terminal)
    with progress, progress.phase("generate"):
        progress.finish_step({"reward": 0.297, "zero_reward_ratio": 0.312, "tokens": 5662.0})
        progress._bar.update(progress._task, phase="generate", refresh=True)  # type: ignore[union-attr]
    last = [line for line in Text.from_ansi(terminal.getvalue()).plain.splitlines() if line.strip()][-1]
    assert "step 1/50" in last and "generate" in last and "s left  reward 0.297" in last and last.endswith("…")


def test_the_bar_of_a_whole_run_does_not_end_in_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with Progress(2, file=terminal) as progress:
        for _ in range(2):
            with progress.phase("train"):
                progress.finish_step({"reward": 0.5, "success": 0.25, "zero_reward_ratio": 0.125, "tokens": 5.0})
            with progress.phase("save"):
                pass
    last = [line for line in Text.from_ansi(terminal.getvalue()).plain.splitlines() if line.strip()][-1]
    assert last.startswith("step 2/2 ") and " done " in last and "reward 0.500  success 0.250" in last
    assert "save" not in last and " left" not in last and len(last.rstrip()) <= 80


def test_a_bar_that_broke_off_shows_where() -> None:
    terminal = Terminal()
    with pytest.raises(KeyError), Progress(1, start=1, file=terminal) as progress, progress.phase("generate"):
        raise KeyError
    last = [line for line in Text.from_ansi(terminal.getvalue()).plain.splitlines() if line.strip()][-1]
    assert "generate" in last and "done" not in last


def test_the_closing_line() -> None:
    first = {"step": 0, "reward": None, "eval/test": 0.25, "eval/test/truncated_ratio": 0.5}
    last = {"step": 8, "reward": 0.4841, "eval/average": None}
    assert closing_line("runs/grpo", [last]) == (
        "done: 8 steps in runs/grpo, reward 0.484; see it: lens-megatron report runs/grpo"
    )
    assert closing_line("my runs/a", [first, {**last, "reward": None}]) == (
        "done: 8 steps in my runs/a, eval/test 0.250; see it: lens-megatron report 'my runs/a'"
    )
    several = {**last, "eval/test": 0.5, "eval/math500": 0.25, "eval/average": 0.375}
    assert ", reward 0.484, eval/average 0.375; see it" in closing_line("runs/grpo", [first, several])
