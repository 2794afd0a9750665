"""Tensors into files: several workers, memory of a few blocks, resumable after a kill.

Rows that lie in the source as they are to be written are copied as bytes, others are put together or converted first.

Sizes and places of everything are known before the first byte, so workers write at offsets and need no order. What is
done is noted in a journal; a run with the same input and options continues after it. Data files carry a name that nothing
loads until all is written and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from checkpoints_tools.pieces import Piece
from checkpoints_tools.sources import Extent, Files, Position, Raw, as_bytes, as_tensor, cut_off
from lens_megatron import checkpoints
from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import take_lock
from lens_megatron.mcore.stored_dtypes import Dtype

BLOCK_BYTES = 2**18  # stays in the cache between read and write: 8 MiB cost four times the CPU
JOURNAL = "journal"
_UNFINISHED = ".unfinished"
_COPY_BYTES = 16 * 2**20  # between two such stretches the bar moves and an error is seen
_AHEAD_BYTES = 128 * 2**20
_SPARE_BYTES = 64 * 2**20  # small files, and what others write meanwhile


class Source(Protocol):
    """Rows to be written. A piece has the dtype of its tensor."""

    @property
    def files(self) -> Files: ...
    def piece_dtype(self, piece: Piece) -> Dtype: ...
    def position(self, piece: Piece) -> Position: ...
    def extents(self, piece: Piece) -> list[Extent] | None: ...
    def raw(self, piece: Piece) -> Raw: ...


@dataclass(frozen=True)
class Job:
    """One tensor of the target. Rows that no piece fills stay zero."""

    name: str
    file: str
    offset: int
    dtype: Dtype
    pieces: tuple[Piece, ...]
    row_shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces) * math.prod(self.row_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """Everything that is to be written."""

    sizes: Mapping[str, int]  # file -> bytes
    fixed: Sequence[tuple[str, int, bytes]]  # file, offset, content: headers and frames
    jobs: Sequence[Job]


@contextlib.contextmanager
def unfinished(target: Path, plan: Plan, made_from: Any, replace: bool = False) -> Iterator[Unfinished]:
    """The folder that becomes `target`: new, or as a killed run left it when that made the same from the same."""
    if target.exists() and not replace:
        raise UsageError(f"{target}: exists already; choose another folder or remove it")
    folder = target.with_name(target.name + ".partial")
    with _disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if not take_lock(handle):
            raise UsageError(f"{folder}: another process is writing it; wait for it, or stop it")
        with _disk_errors(target):
            yield Unfinished(target, folder, handle, plan, made_from)
            (target / JOURNAL).unlink()  # last: a run that is killed before has nothing to do again
    finally:
        os.close(handle)


class Unfinished:
    def __init__(self, target: Path, folder: Path, journal: int, plan: Plan, made_from: Any) -> None:
        self.target, self.folder, self.plan = target, folder, plan
        self._journal = journal
        self._lock = threading.Lock()
        self._local = threading.local()
        # After a power cut the journal may know of bytes that never reached the disk: it counts only in the same boot.
        head = json.dumps({"made_from": made_from, "sizes": dict(plan.sizes), "boot": _boot()}, sort_keys=True)
        self.done = self._read_journal(head)
        allocated = sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) if self.done else 0
        self._check_space(sum(plan.sizes.values()) - allocated)
        self._files = {name: self._create(name, size) for name, size in plan.sizes.items()}
        if not self.done:
            os.ftruncate(journal, 0)
            os.write(journal, head.encode() + b"\n")
        for name, offset, content in plan.fixed:
            self.write(name, offset, memoryview(content))

    def _read_journal(self, head: str) -> set[str]:
        first, *lines = os.pread(self._journal, 2**30, 0).decode(errors="replace").split("\n")
        if first == head:
            return set(lines[:-1])  # a last line without its end was being written
        for path in self.folder.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return set()

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed + _SPARE_BYTES > free:
            if not self.done:
                shutil.rmtree(self.folder)
            raise RunError(
                f"{self.target}: needs {_size(needed)} and {_size(_SPARE_BYTES)} to spare, the disk has {_size(free)} free; "
                "nothing was written: free space or choose another disk"
            )

    def _create(self, name: str, size: int) -> int:
        path = self.folder / (name + _UNFINISHED)
        if (self.folder / name).exists():  # killed while it was being completed
            (self.folder / name).rename(path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(handle, size)
        return handle

    def write(self, name: str, offset: int, content: memoryview) -> None:
        while content:
            written = os.pwrite(self._files[name], content, offset)
            content, offset = content[written:], offset + written

    def copy(self, name: str, offset: int, extent: Extent, files: Files) -> None:
        """Bytes of another file, through a block that stays in the processor's cache. The kernel's own copying
        (copy_file_range) takes half as long again where the two places differ within a page, and they nearly always do."""
        if not hasattr(self._local, "block"):
            self._local.block = memoryview(bytearray(BLOCK_BYTES))
        source, place, left = files.handle(extent.path), extent.offset, extent.length
        while left:
            count = os.preadv(source, [self._local.block[:left]], place)
            if count == 0:
                raise cut_off(extent)
            self.write(name, offset, self._local.block[:count])
            place, offset, left = place + count, offset + count, left - count

    def finished(self, job: Job) -> None:
        with self._lock:
            os.write(self._journal, job.name.encode() + b"\n")
            self.done.add(job.name)

    def close(self) -> None:
        """All data on disk, under its names."""
        for name, handle in self._files.items():
            os.fsync(handle)
            os.close(handle)
            (self.folder / (name + _UNFINISHED)).rename(self.folder / name)
        self._files = {}

    def __del__(self) -> None:
        for handle in getattr(self, "_files", {}).values():
            os.close(handle)


def stream(target: Unfinished, source: Source, workers: int, on_bytes: Callable[[int], None]) -> None:
    """Do all jobs that are not done. The first error ends it; what is done stays noted."""
    stop = threading.Event()
    # a disk is read fastest from its beginning to its end
    jobs = sorted(
        (job for job in target.plan.jobs if job.name not in target.done), key=lambda job: source.position(job.pieces[0])
    )
    ahead = _ReadAhead(jobs, source)
    on_bytes(sum(job.bytes for job in target.plan.jobs) - sum(job.bytes for job in jobs))

    def work(job: Job) -> None:
        offset = job.offset
        for piece in job.pieces:
            for block in _blocks(piece, job, source):
                if stop.is_set():
                    return
                ahead.go_on()
                if isinstance(block, Extent):
                    target.copy(job.file, offset, block, source.files)
                    size = block.length
                else:
                    content = _content(block, job, source)
                    target.write(job.file, offset, content)
                    size = len(content)
                offset += size
                on_bytes(size)
                ahead.done += size
        target.finished(job)

    def guarded(job: Job) -> None:
        try:
            work(job)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in [pool.submit(guarded, job) for job in jobs]:
                done.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _ReadAhead:
    """Asks the kernel for what will be copied soon. It sees several threads in one file jump to and fro, and by itself
    reads far too much or far too little."""

    def __init__(self, jobs: Sequence[Job], source: Source) -> None:
        self.done = 0  # bytes copied; counted without care, for it only says how far to look
        self._asked = 0
        self._jobs = iter(jobs)
        self._source = source
        self._turn = threading.Lock()

    def go_on(self) -> None:
        if not hasattr(os, "posix_fadvise") or not self._turn.acquire(blocking=False):
            return
        try:
            while self._asked < self.done + _AHEAD_BYTES and (job := next(self._jobs, None)) is not None:
                self._ask(job)
                self._asked += job.bytes
        finally:
            self._turn.release()

    def _ask(self, job: Job) -> None:
        """From its first byte to its last in a file: between them lie tensors that are copied next."""
        extents = sorted(extent for piece in job.pieces for extent in self._source.extents(piece) or [])
        for path, group in itertools.groupby(extents, key=lambda extent: extent.path):
            members = list(group)
            start, length = members[0].offset, members[-1].offset + members[-1].length - members[0].offset
            os.posix_fadvise(self._source.files.handle(path), start, length, os.POSIX_FADV_WILLNEED)


def _blocks(piece: Piece, job: Job, source: Source) -> Iterator[Extent | Piece]:
    """What is copied or written at once."""
    extents = source.extents(piece) if source.piece_dtype(piece) == job.dtype else None
    if extents is None:
        rows = max(1, BLOCK_BYTES // (math.prod(job.row_shape) * job.dtype.itemsize))
        for start in range(piece.start, piece.stop, rows):
            yield Piece(piece.tensor, start, min(start + rows, piece.stop))
        return
    for path, offset, length in extents:
        for start in range(0, length, _COPY_BYTES):
            yield Extent(path, offset + start, min(_COPY_BYTES, length - start))


def _content(piece: Piece, job: Job, source: Source) -> memoryview:
    raw, dtype = source.raw(piece), source.piece_dtype(piece)
    if dtype == job.dtype:
        return memoryview(raw.reshape(-1))  # type: ignore[arg-type]
    import torch

    return as_bytes(as_tensor(raw, dtype, job.row_shape).to(getattr(torch, job.dtype.name)))


def default_workers() -> int:
    """Enough to keep a disk busy; more only makes the writes jump about."""
    return min(4, os.cpu_count() or 1)


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "repair that"
        raise RunError(f"{target}: not written ({error.strerror}); {remedy} and run it again: it continues") from None


def write_small(folder: Path, files: Mapping[str, bytes]) -> dict[str, int]:
    sizes = {}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        sizes[name] = checkpoints.write_file(folder / name, content)
    return sizes


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
