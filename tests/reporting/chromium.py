"""Pages in a browser. `python -m tests.reporting.chromium` installs it, as root on Debian; `make test` calls that first."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.apt import can_install, install

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
]


def found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def in_chromium(page: Path, tmp_path: Path, *more: str) -> tuple[str, list[str]]:
    """The page's DOM after its script has run, and what the console said."""
    program = found()
    if program is None:
        pytest.skip("no chromium here")
    command = [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def main() -> None:
    if found() is None and can_install():
        install("chromium")
    if found() is None:
        print("tests in a browser will be skipped: no chromium (apt-get install chromium)")


if __name__ == "__main__":
    main()
