"""python -m tests.slurm.packages: installs what the test cluster is made of, as root on Debian; elsewhere says what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.slurm.cluster import missing, missing_accounting

_SLURM = ("slurm-wlm", "munge")
_ACCOUNTING = ("slurmdbd", "mariadb-server")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Debian starts what it installs: here munge and MariaDB, which the tests do not want (they start their own)."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():  # as containers have it; whoever wrote it knows why
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def install(*packages: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:  # lists of a fresh image are empty
        subprocess.run(["apt-get", "update", "--quiet"], env=environment, capture_output=True, check=False)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(packages)}: not installed: {(done.stderr.strip().splitlines() or ['apt-get failed'])[-1]}")


def main() -> None:
    can = os.geteuid() == 0 and shutil.which("apt-get") is not None
    for absent, packages in ((missing, _SLURM), (missing_accounting, _ACCOUNTING)):
        if can and absent():
            with no_services():
                install(*packages)
    for reason in filter(None, (missing(), missing_accounting())):
        print(f"tests will be skipped: {reason}")


if __name__ == "__main__":
    main()
