"""What a benchmark's numbers were measured on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def machine() -> dict[str, Any]:
    load = os.getloadavg()[0]
    return {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, shared with other work",
        "load_average": round(load, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "megatron-core", "transformers", "pyarrow", "triton")},
        },
        "date": date.today().isoformat(),
    }


def described() -> str:
    """The same in a line."""
    there = machine()
    versions = ", ".join(f"{name} {number}" for name, number in there["versions"].items())
    return f"{there['machine']}, load {there['load_average']}, {versions}, {there['date']}."


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
