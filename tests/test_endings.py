"""What a command says when it is told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_megatron import endings
from lens_megatron.errors import RunError

COMMANDS = Path(endings.__file__).parent / "commands"
ENDING = sorted(path.stem for path in COMMANDS.glob("*.py") if "endings.on_signals(" in path.read_text())


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("given, says", [((), "run it again to go on"), ((endings.RESUME,), "go on with --resume")])
def test_the_callers_advice_is_given(given: tuple[str, ...], says: str) -> None:
    endings.on_signals(*given)
    with pytest.raises(RunError, match=f"ended by SIGTERM; {says}"):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", ENDING)
def test_resume_is_advised_by_commands_that_have_it(name: str) -> None:
    source = (COMMANDS / f"{name}.py").read_text()
    assert ("endings.RESUME" in source) == ('add_argument("--resume"' in source)


def test_commands_that_find_what_is_done_end_in_order() -> None:
    assert {"analyze", "eval", "quickstart"} <= set(ENDING)
