"""Files that stay whole whatever happens while they are written: a kill, a full disk, another process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def take_lock(file: int | IO[Any]) -> bool:
    """False: another process has it. Held until this process closes the file, by any handle, or ends. A file system without
    locks refuses nobody."""
    try:
        # a record lock: not inherited by forked children, so an orphan of a killed process does not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def append_line(file: IO[bytes], line: bytes, on_disk: bool = False) -> None:
    """All of it or, with an OSError, nothing: half a line would spoil the next one. `file`: unbuffered, for a buffer's
    rest would be written once more on closing. `on_disk`: it survives a power cut, too."""
    size = file.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[file.write(line) :]
        if on_disk:
            os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Whoever reads it meanwhile, or after a kill or a power cut, finds what was there before or all of the new."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()))
