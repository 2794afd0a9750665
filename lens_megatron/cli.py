"""`lens-megatron COMMAND`: find the command's file, parse, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from lens_megatron import __version__, commands, workers
from lens_megatron.errors import RunError, Terminated, UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def command_names() -> list[str]:
    names = (module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{commands.__name__}.{name.replace('-', '_')}")


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; the other commands' files are not imported."""
    module = _module(name)
    parser = _Parser(
        prog=f"lens-megatron {name}",
        description=module.SUMMARY,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    return parser


def _overview() -> str:
    lines = [f"lens-megatron {__version__}: LENS and the GRPO family at Megatron scale", "", "commands:"]
    lines += [f"  {name:<12} {_module(name).SUMMARY}" for name in command_names()]
    return "\n".join([*lines, "", "lens-megatron COMMAND --help shows its options and an example."])


def _dispatch(arguments: Sequence[str]) -> int:
    names = command_names()
    if not arguments:
        print(_overview())
        raise UsageError("no command given")
    name = arguments[0]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}"
        raise UsageError(f"unknown command {name!r}; {hint}")
    try:
        parsed = _parse(build_parser(name), arguments[1:])
    except SystemExit as stop:  # --help printed what was asked for
        return int(stop.code or 0)
    workers.end_with_starter()
    return int(_module(name).run(parsed))


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """key=value before, between and after options; argparse cannot mix when there are subcommands."""
    if any(action.nargs == argparse.PARSER for action in parser._actions):
        return parser.parse_args(arguments)
    return parser.parse_intermixed_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    _quiet_torch()
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where a reader that has gone away is still handled
        return code
    except UsageError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (RunError, Terminated) as error:
        print(f"failed: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted{_what_then()}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise  # a connection of ours broke: that is a failure, not `| head`
        return 0


def _quiet_torch() -> None:
    """For this process, before it imports torch, and for those that it starts. torch's C++ warns of each look at the store
    that finds nothing yet: two lines every two seconds and waiting rank. Its errors are still told."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _what_then() -> str:
    """Of commands that say how to go on (endings.on_signals), which others need not import."""
    endings: Any = sys.modules.get("lens_megatron.endings")
    advice = "" if endings is None else endings.advice()
    return f"; {advice}" if advice else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).splitlines())


def _stdout_is_gone() -> bool:
    """`lens-megatron ... | head` closes our output early. What is left unwritten goes nowhere, and quietly so."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


if __name__ == "__main__":
    sys.exit(main())
