"""`lens-megatron COMMAND`: find the command's file, parse, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from lens_megatron import __version__, commands
from lens_megatron.errors import RunError, UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def command_names() -> list[str]:
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; the other commands' files are not imported."""
    module = importlib.import_module(f"{commands.__name__}.{name.replace('-', '_')}")
    parser = _Parser(
        prog=f"lens-megatron {name}",
        description=module.SUMMARY,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    parser.set_defaults(run=module.run)
    return parser


def _overview() -> str:
    lines = [f"lens-megatron {__version__}: LENS and the GRPO family at Megatron scale", "", "commands:"]
    for name in command_names():
        module = importlib.import_module(f"{commands.__name__}.{name.replace('-', '_')}")
        lines.append(f"  {name:<12} {module.SUMMARY}")
    return "\n".join([*lines, "", "lens-megatron COMMAND --help shows its options and an example."])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(__version__)
            return 0
        name = arguments[0]
        if name not in command_names():
            raise UsageError(f"unknown command {name!r}; one of: {', '.join(command_names())}")
        parsed = build_parser(name).parse_args(arguments[1:])
        return int(parsed.run(parsed))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lens-megatron ... | head`
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
