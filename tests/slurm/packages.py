"""python -m tests.slurm.packages: installs what the test cluster is made of, as root on Debian; elsewhere says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.apt import can_install, install
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


def main() -> None:
    for absent, packages in ((missing, _SLURM), (missing_accounting, _ACCOUNTING)):
        if can_install() and absent():
            with no_services():
                install(*packages)
    for reason in filter(None, (missing(), missing_accounting())):
        print(f"tests will be skipped: {reason}")


if __name__ == "__main__":
    main()
