"""What can be learnt about this machine without changing it, for the doctor and for what a run writes down of itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

GIB = 1024**3


@dataclass(frozen=True)
class Output:
    """Of a command: whether it ended well, and what it printed (stderr when it did not)."""

    ok: bool
    text: str


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_place(name: str) -> Path | None:
    """Where `import name` would find a top-level module. Nothing of it is executed."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def run_command(command: Sequence[str], timeout_s: float | None = None) -> Output | None:
    """None when there is no such program. A broken driver or controller may hang its tools, hence the limit."""
    if shutil.which(command[0]) is None:
        return None
    if timeout_s is None:  # importing torch from a cold network file system takes minutes
        timeout_s = 600.0 if command[0] == sys.executable else 60.0
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Output(False, f"{Path(command[0]).name} did not answer within {timeout_s:g} s")
    return Output(done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr).strip())


def usable_cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_bytes() -> int | None:
    """What this process may still take: the machine's available memory, within its container's limit."""
    bounds = [_meminfo_available(), _cgroup_left("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")]
    v1 = Path("/sys/fs/cgroup/memory")
    bounds.append(_cgroup_left(str(v1 / "memory.limit_in_bytes"), str(v1 / "memory.usage_in_bytes")))
    known = [bound for bound in bounds if bound is not None]
    return min(known) if known else _psutil_available()


def _meminfo_available() -> int | None:
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left(limit: str, used: str) -> int | None:
    if not (Path(limit).exists() and Path(used).exists()):
        return None
    most = Path(limit).read_text().strip()
    return max(0, int(most) - int(Path(used).read_text())) if most.isdigit() else None


def _psutil_available() -> int | None:  # macOS has no /proc
    if module_place("psutil") is None:
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def open_file_limit() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


_SOCKETS = 65536


def allow_many_sockets() -> None:
    """Past the usual 1024: gloo connects each rank of every group with each, and a rollout in flight has a connection."""
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY:
        wanted = _SOCKETS if most == resource.RLIM_INFINITY else min(most, _SOCKETS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def shared_memory_bytes() -> int | None:
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).total if folder.exists() else None


def rdma_devices() -> list[str]:
    folder = Path("/sys/class/infiniband")
    return sorted(device.name for device in folder.iterdir()) if folder.exists() else []


def machine_and_versions() -> dict[str, Any]:
    """Without touching CUDA: this may run before the processes that need it first."""
    from lens_megatron import __version__

    packages = ("torch", "megatron-core", "transformers", "transformer-engine", "sglang", "numpy", "pyarrow")
    gpus = run_command(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return {
        "lens_megatron": __version__,
        "python": platform.python_version(),
        **{name: version for name in packages if (version := installed_version(name)) is not None},
        "git": _git_commit(),
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "cpus": usable_cores(),
            "gpus": gpus.text.splitlines() if gpus is not None and gpus.ok else [],
        },
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git_commit() -> dict[str, Any] | None:
    """Of this package's own checkout, not of a repository that an installed package happens to lie in."""
    here = str(Path(__file__).parent)
    tracked = run_command(["git", "-C", here, "ls-files", "--error-unmatch", Path(__file__).name])
    commit = run_command(["git", "-C", here, "rev-parse", "HEAD"])
    if tracked is None or commit is None or not (tracked.ok and commit.ok):
        return None
    changes = run_command(["git", "-C", here, "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit.text, "changed": bool(changes and changes.text)}


@dataclass(frozen=True)
class Machine:
    """Each question that the doctor asks, as a function that a test can replace."""

    python_version: tuple[int, int] = sys.version_info[:2]
    system: str = sys.platform
    version: Callable[[str], str | None] = installed_version
    place: Callable[[str], Path | None] = module_place
    run: Callable[[Sequence[str]], Output | None] = run_command
    free_memory: Callable[[], int | None] = free_memory_bytes
    free_disk: Callable[[Path], int] = free_disk_bytes
    open_files: Callable[[], int] = open_file_limit
    shared_memory: Callable[[], int | None] = shared_memory_bytes
    rdma: Callable[[], list[str]] = rdma_devices
