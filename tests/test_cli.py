"""Exit codes and the one line on stderr. Every command: help with an example, and no heavy import to show it."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lens_megatron import __version__, cli, endings
from lens_megatron.errors import RunError, UsageError


def fake_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """A command `try` that does what a test needs. Its positional is named `run`, as RUN is in real ones."""
    module = types.ModuleType("lens_megatron.commands.try_it")
    module.SUMMARY, module.EXAMPLE = "try", "lens-megatron try-it x"  # type: ignore[attr-defined]

    def configure(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("run", nargs="?")
        parser.add_argument("--number", type=int)

    module.configure, module.run = configure, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "command_names", lambda: ["models", "try-it"])


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "--help")
    assert (code, err) == (0, "")
    for name in cli.command_names():
        assert f"\n  {name} " in out
    assert outcome(capsys, "--version") == (0, f"{__version__}\n", "")
    code, out, err = outcome(capsys)
    assert (code, err) == (2, "error: no command given\n")
    assert "models" in out


def test_files_that_start_with_an_underscore_are_no_commands() -> None:
    assert not [name for name in cli.command_names() if name.startswith(("_", "-"))]


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, name, "--help")
    assert (code, err) == (0, "")
    module = importlib.import_module(f"lens_megatron.commands.{name.replace('-', '_')}")
    assert module.EXAMPLE.startswith(f"lens-megatron {name}")
    assert module.EXAMPLE.splitlines()[0] in out


def test_usage_errors_exit_2_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bad_input(args: argparse.Namespace) -> int:
        raise UsageError("f.yaml: wrong\nin two lines")

    fake_command(monkeypatch, bad_input)
    assert outcome(capsys, "try-it") == (2, "", "error: f.yaml: wrong in two lines\n")
    for arguments in (["try-it", "--number", "x"], ["try-it", "--nonsense"], ["try-it", "--num", "1"]):
        code, out, err = outcome(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert "lens-megatron try-it --help" in err
        assert err.count("\n") == 1


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "modles")
    assert (code, out, err) == (2, "", "error: unknown command 'modles'; did you mean 'models'?\n")
    assert "one of: " in outcome(capsys, "zzzz")[2]


def test_a_failed_run_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failed(args: argparse.Namespace) -> int:
        raise RunError("the sync differs by 0.3")

    fake_command(monkeypatch, failed)
    assert outcome(capsys, "try-it") == (1, "", "failed: the sync differs by 0.3\n")


def test_a_command_decides_its_own_exit_code_and_sees_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_command(monkeypatch, lambda args: 1 if args.run == "x" and args.number == 3 else 0)
    assert outcome(capsys, "try-it", "x", "--number", "3")[0] == 1
    assert outcome(capsys, "try-it", "y")[0] == 0


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    fake_command(monkeypatch, interrupted)
    monkeypatch.setattr(endings, "advice", lambda: "")
    assert outcome(capsys, "try-it") == (130, "", "interrupted\n")
    monkeypatch.setattr(endings, "advice", lambda: "run it again to go on")
    assert outcome(capsys, "try-it") == (130, "", "interrupted; run it again to go on\n")


def test_a_broken_connection_of_ours_is_not_taken_for_a_closed_pipe() -> None:
    code = (
        "from lens_megatron import cli\n"
        "def engine_gone(arguments): raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli._dispatch = engine_gone\n"
        "raise SystemExit(cli.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


@pytest.mark.parametrize("command", ["--help", "models"])  # plain prints, and a rich table
@pytest.mark.parametrize("buffering", [[], ["-u"]])
def test_a_reader_that_goes_away_is_no_error(buffering: list[str], command: str) -> None:
    """As in `lens-megatron --help | true`: nobody reads any more when the output is written."""
    code = f"import time; time.sleep(0.3); from lens_megatron.cli import main; raise SystemExit(main([{command!r}]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, *buffering, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")


HEAVY = ("torch", "megatron", "transformers", "sglang", "numpy", "huggingface_hub")
# What the command that starts the workers goes through; they import the rest themselves.
LAUNCH = (
    "import lens_megatron.workers, lens_megatron.endings, lens_megatron.mcore.hf_files, lens_megatron.mcore.layout; "
    "from lens_megatron.config import load_run; from pathlib import Path; "
    "load_run(Path('RUN.yaml'), ['diagnostics.every=5', 'memory.recompute=full', 'optimizer.lr=1e-5'])"
)


@pytest.mark.parametrize(
    "code",
    [
        "import lens_megatron, lens_megatron.cli, lens_megatron.strict, lens_megatron.types",
        "from lens_megatron.model_spec import load_model_spec; load_model_spec('qwen3-8b-base')",
        "from lens_megatron.cli import main; assert main(['--help']) == 0",
    ],
)
def test_light_imports(code: str, tmp_path: Path) -> None:
    assert imported(HEAVY, code, tmp_path) == "0"


def test_counting_a_models_bytes_takes_numpy_and_nothing_heavier(tmp_path: Path) -> None:
    heavy = tuple(name for name in HEAVY if name != "numpy")
    assert imported(heavy, "from lens_megatron.cli import main; assert main(['models']) == 0", tmp_path) == "0"


def test_reading_a_run_imports_neither_megatron_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "RUN.yaml").write_text("{model: m, run_dir: r, algorithm: lens, data: {train: t.jsonl}}")
    heavy = ("megatron", "transformers", "sglang", "pyarrow", "torch._dynamo")
    assert imported(heavy, LAUNCH, tmp_path) == "0"
    assert imported(("torch",), LAUNCH, tmp_path) == "['torch']"  # the check can see what is there


def imported(heavy: tuple[str, ...], code: str, folder: Path) -> str:
    """Which of these `code` imports; "0" when none."""
    check = f"{code}\nimport sys\nraise SystemExit(str([m for m in {heavy!r} if m in sys.modules] or 0))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=folder, check=False)
    return done.stderr.strip()
