"""What a command says when it is told to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lens_megatron import cli, endings
from lens_megatron.errors import Terminated
from lens_megatron.rollout.weight_sync import distributed
from lens_megatron.run_folder import RunFolder

COMMANDS = Path(endings.__file__).parent / "commands"
ENDING = sorted(path.stem for path in COMMANDS.glob("*.py") if "endings.on_signals(" in path.read_text())


@pytest.mark.parametrize("given, says", [((), "run it again to go on"), ((endings.AFRESH,), "start it again")])
def test_the_callers_advice_is_given(given: tuple[str, ...], says: str) -> None:
    endings.on_signals(*given)
    with pytest.raises(Terminated, match=f"ended by SIGTERM; {says}"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_resume_is_advised_where_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    def said() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "_dispatch", interrupted)
            assert cli.main([]) == 130
        return capsys.readouterr().err

    endings.on_signals(endings.RESUME)
    assert said() == f"interrupted; {endings.AFRESH}\n"  # before RUN.yaml was read
    endings.resumes_in(str(tmp_path / "run"))
    assert said() == f"interrupted; {endings.AFRESH}\n"
    RunFolder.create(tmp_path / "run").begin({"seed": 1})
    assert said() == f"interrupted; {endings.RESUME}\n"


@pytest.mark.parametrize("name", ENDING)
def test_resume_is_advised_by_commands_that_have_it(name: str) -> None:
    source = (COMMANDS / f"{name}.py").read_text()
    assert ("endings.RESUME" in source) == ('add_argument("--resume"' in source)


def test_commands_that_find_what_is_done_end_in_order() -> None:
    assert {"analyze", "eval", "quickstart"} <= set(ENDING)


def test_being_told_to_end_is_no_error_of_the_work_on_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it comes, it ends the command: a checkpoint that was being read is not damaged by it, for one."""
    endings.on_signals(endings.RESUME)
    RunFolder.create(tmp_path).begin({"seed": 1})
    endings.resumes_in(str(tmp_path))

    def works(*_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            return 0
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_dispatch", works)
        assert cli.main([]) == 1
    assert capsys.readouterr().err == f"failed: ended by SIGTERM; {endings.RESUME}\n"


def test_a_leader_that_is_told_to_end_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = distributed.DistributedTransport("gloo", "127.0.0.1")

    def told(*_: object) -> None:
        raise Terminated("ended by SIGTERM")

    monkeypatch.setattr(transport, "_meet", told)
    with pytest.raises(Terminated):
        transport._lead(SimpleNamespace(checksums=None), [], iter([]), 0, None)
