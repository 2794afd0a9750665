"""The environment of the real SGLang server on a machine without a GPU; built once, kept outside the checkout.

python -m tests.sglang.venv        builds it where it is missing, and prints its python

LENS_SGLANG_VENV names another folder. The default one is keyed by its requirements, so that clones share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
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
    return (folder() / ".installed").exists()


def build() -> Path:
    """Its python; a build that was cut short starts afresh, and two at once wait for each other."""
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_built():
            print(f"building the SGLang environment in {place} (3.3 GB, some minutes)", file=sys.stderr, flush=True)
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            pip = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", str(_requirements())], check=True, stdout=sys.stderr)
            subprocess.run([*pip, "--no-deps", f"sglang=={VERSION}"], check=True, stdout=sys.stderr)
            (place / ".installed").touch()
    return python()


def build_beside(package: str, version: str) -> Path:
    """A folder for PYTHONPATH that holds one package without what it needs, which the environment has."""
    place = _cache() / f"{package}-{version}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / ".installed").exists():
            shutil.rmtree(place, ignore_errors=True)
            pip = [str(build()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(place), f"{package}=={version}"], check=True, stdout=sys.stderr)
            (place / ".installed").touch()
    return place


def build_router() -> Path:
    return build_beside("sglang-router", ROUTER_VERSION)


def build_older() -> Path:
    return build_beside("sglang", OLDER_VERSION)


def _requirements() -> Path:
    return HERE / "requirements.txt"


if __name__ == "__main__":
    print(build())
    build_router()
    build_older()
