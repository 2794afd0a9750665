"""The environment of the real SGLang server on a machine without a GPU; built once, kept outside the checkout.

python -m tests.sglang.venv        builds it where it is missing, and prints its python; exits 1 with one line where it cannot

LENS_SGLANG_VENV names another folder. The default one is keyed by its requirements, so that clones share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
VERSION = "0.5.21"
OLDER_VERSION = "0.5.20"  # the last without weight-update sessions
ROUTER_VERSION = "0.3.2"


def folder() -> Path:
    if named := os.environ.get("LENS_SGLANG_VENV"):
        return Path(named)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256(f"{VERSION} {python} {_requirements().read_text()}".encode()).hexdigest()[:12]
    return _cache() / f"sglang-{VERSION}-{key}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lens-megatron"


def python() -> Path:
    return folder() / "bin" / "python"


def is_built() -> bool:
    """Also one that somebody else made, at LENS_SGLANG_VENV: nothing is deleted that was not begun here."""
    return python().exists() and not _unfinished().exists()


def _unfinished() -> Path:
    return folder() / ".building"


def build() -> Path:
    """Its python; a build that was cut short starts afresh, and two at once wait for each other."""
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_built():
            began = time.monotonic()
            _say(f"building the SGLang environment in {place} (3.3 GB, some minutes)")
            if _unfinished().exists():
                shutil.rmtree(place)
            place.mkdir(exist_ok=True)
            _unfinished().touch()
            _run(sys.executable, "-m", "venv", str(place))
            _install("-r", str(_requirements()))
            _install("--no-deps", f"sglang=={VERSION}")
            _unfinished().unlink()
            _say(f"built in {time.monotonic() - began:.0f} s")
    return python()


def build_beside(package: str, version: str) -> Path:
    """A folder for PYTHONPATH that holds one package without what it needs, which the environment has."""
    place = _cache() / f"{package}-{version}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / ".installed").exists():
            shutil.rmtree(place, ignore_errors=True)
            build()
            _install("--no-deps", "--target", str(place), f"{package}=={version}")
            (place / ".installed").touch()
    return place


def build_router() -> Path:
    return build_beside("sglang-router", ROUTER_VERSION)


def build_older() -> Path:
    return build_beside("sglang", OLDER_VERSION)


def _requirements() -> Path:
    return HERE / "requirements.txt"


def _install(*what: str) -> None:
    _run(str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    try:
        print(build())
        build_router()
        build_older()
    except subprocess.CalledProcessError as error:
        _say(
            f"error: the tests with the real SGLang server need an environment that could not be built: {' '.join(error.cmd)} "
            f"failed (exit code {error.returncode}; its own words are above). It needs a package index and 4 GB at {folder()}; "
            "LENS_SGLANG_VENV names an environment that is there already"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
