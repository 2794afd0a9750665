"""Files that stay whole; what needs a full disk or a second process is tested where they are used."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

import pytest

from lens_megatron.files import append_line, replace_file, take_lock


@pytest.mark.parametrize(
    ("number", "taken"), [(errno.EAGAIN, False), (errno.EACCES, False), (errno.ENOLCK, True), (errno.ENOSYS, True)]
)
def test_a_file_system_without_locks_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, taken: bool
) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with (tmp_path / "lock").open("w") as file:
        assert take_lock(file) is taken


def test_what_fails_while_it_is_written_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("before")

    def half(file: IO[bytes]) -> None:
        file.write(b"aft")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        replace_file(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_line_that_does_not_reach_the_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with (tmp_path / "f").open("ab", buffering=0) as file:
        append_line(file, b"one\n")
        monkeypatch.setattr("os.fsync", fsync)
        append_line(file, b"two\n")
        with pytest.raises(OSError, match="full"):
            append_line(file, b"three\n", on_disk=True)
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"
