"""One tensor as torch.save writes it (a zip archive), taken apart so that the tensor itself never has to be in memory.

A .distcp file of a distributed checkpoint is such archives one after another. `frame` gives what stands before and after
the tensor's bytes; `find_bytes` finds them in an archive that torch wrote. All without torch, whose import takes longer
than copying a small model.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from lens_megatron.errors import UsageError
from lens_megatron.mcore import safe_pickle
from lens_megatron.mcore.stored_dtypes import BY_STORAGE, Dtype

_ALIGNMENT = 64
_UTF8 = 0x0800
_DATE = (1 << 5) | 1  # 1 January 1980: an archive does not depend on when it was written
_ZIP64_LIMIT = 0xFFFFFFFF


@dataclass(frozen=True)
class Frame:
    head: bytes
    data_bytes: int
    tail: bytes

    @property
    def size(self) -> int:
        return len(self.head) + self.data_bytes + len(self.tail)


def frame(shape: tuple[int, ...], dtype: Dtype) -> Frame:
    """The archive of a contiguous tensor without its bytes. Their checksum is left out; torch.load does not look at it."""
    return _archive(_tensor_pickle(shape, dtype), math.prod(shape) * dtype.itemsize)


def plain_archive(value: Any) -> bytes:
    """What torch.save writes of plain values."""
    return _archive(pickle.dumps(value, protocol=2), None).head


def _archive(pickled: bytes, size: int | None) -> Frame:
    """`size`: of the only storage; None when there is none, and then all is head."""
    before = {"data.pkl": pickled, ".storage_alignment": str(_ALIGNMENT).encode()}
    before |= {".format_version": b"1", "byteorder": b"little"}
    head, entries = bytearray(), []
    for name, content in before.items():
        entries.append(_Entry(f"archive/{name}", len(content), zlib.crc32(content), len(head)))
        head += entries[-1].local_header() + content
    if size is not None:
        entries.append(_Entry("archive/data/0", size, 0, len(head)))
        head += entries[-1].local_header()
    tail, content = bytearray(), b"3\n"
    entries.append(_Entry("archive/version", len(content), zlib.crc32(content), len(head) + (size or 0)))
    tail += entries[-1].local_header() + content
    start = len(head) + (size or 0) + len(tail)
    directory = b"".join(entry.central_header() for entry in entries)
    tail += directory + _end(len(entries), len(directory), start)
    return Frame(bytes(head + tail), 0, b"") if size is None else Frame(bytes(head), size, bytes(tail))


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    crc: int
    offset: int  # of its local header

    def local_header(self) -> bytes:
        """Padded so that the content begins at a multiple of the alignment."""
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.size >= _ZIP64_LIMIT else b""
        before = self.offset + 30 + len(self.name) + len(extra) + 4
        padding = -before % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        size = min(self.size, _ZIP64_LIMIT)
        fields = (0x04034B50, 45, _UTF8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return struct.pack("<IHHHHHIIIHH", *fields) + self.name.encode() + extra

    def central_header(self) -> bytes:
        large = struct.pack("<QQ", self.size, self.size) if self.size >= _ZIP64_LIMIT else b""
        large += struct.pack("<Q", self.offset) if self.offset >= _ZIP64_LIMIT else b""
        extra = struct.pack("<HH", 1, len(large)) + large if large else b""
        size, offset = min(self.size, _ZIP64_LIMIT), min(self.offset, _ZIP64_LIMIT)
        fields = (0x02014B50, 0, 45, _UTF8, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        return struct.pack("<IHHHHHHIIIHHHHHII", *fields, 0, 0, 0, 0, offset) + self.name.encode() + extra


def _end(entries: int, directory_size: int, directory_start: int) -> bytes:
    large = b""
    if directory_start >= _ZIP64_LIMIT:
        fields = (0x06064B50, 44, 45, 45, 0, 0, entries, entries, directory_size, directory_start)
        large = struct.pack("<IQHHIIQQQQ", *fields)
        large += struct.pack("<IIQI", 0x07064B50, 0, directory_start + directory_size, 1)
    start = min(directory_start, _ZIP64_LIMIT)
    return large + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, entries, entries, directory_size, start, 0)


def _tensor_pickle(shape: tuple[int, ...], dtype: Dtype) -> bytes:
    """What torch.save says about a contiguous tensor, whose only storage is called 0."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    out = io.BytesIO()
    out.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage")
    out.write(f"ctorch\n{dtype.storage}\n".encode())
    out.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + _integer(math.prod(shape)) + b"tQ")
    for numbers in ([0], shape, strides):
        packed = b"".join(_integer(number) for number in numbers)
        out.write(packed if numbers == [0] else b"(" + packed + b"t")
    out.write(b"\x89ccollections\nOrderedDict\n)RtR.")
    return out.getvalue()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1 of eight bytes


@dataclass(frozen=True)
class TensorBytes:
    """Where a contiguous tensor lies in a file."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int  # in the file


def find_bytes(file: int, offset: int, length: int, where: str) -> TensorBytes:
    """Of the archive at [offset, offset + length) of an open file. Reads its directory and its small parts only."""
    view = _View(file, offset, length)
    try:
        archive = zipfile.ZipFile(view)
        entries = {entry.filename.split("/", 1)[1]: entry for entry in archive.infolist()}
        text, storage = archive.read(entries["data.pkl"]), entries["data/0"]
        view.seek(storage.header_offset)
        name_size, extra_size = struct.unpack("<26x2H", view.read(30))
    except (zipfile.BadZipFile, KeyError, IndexError, struct.error, EOFError) as error:
        raise UsageError(f"{where}: no tensor archive at byte {offset:,} ({error}); damaged") from None
    dtype, start, shape, strides = _read_tensor_pickle(text, where)
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(size > 1 and have != want for size, have, want in zip(shape, strides, contiguous, strict=True)):
        raise UsageError(f"{where}: the tensor at byte {offset:,} is not stored contiguously")
    if storage.compress_type != zipfile.ZIP_STORED or (start + math.prod(shape)) * dtype.itemsize > storage.file_size:
        raise UsageError(f"{where}: the tensor at byte {offset:,} is shorter than its shape {shape}; damaged")
    first = offset + storage.header_offset + 30 + name_size + extra_size
    return TensorBytes(dtype, shape, first + start * dtype.itemsize)


def _read_tensor_pickle(text: bytes, where: str) -> tuple[Dtype, int, tuple[int, ...], tuple[int, ...]]:
    allowed: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in BY_STORAGE.items()}
    allowed["torch._utils", "_rebuild_tensor_v2"] = lambda *parts: parts
    allowed["collections", "OrderedDict"] = collections.OrderedDict
    pickled = _TensorPickle(io.BytesIO(text), allowed, where)
    try:
        dtype, start, shape, strides, *_ = pickled.load()
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UsageError(f"{where}: a tensor's description is not readable ({error}); damaged") from None
    return dtype, int(start), tuple(shape), tuple(strides)


class _TensorPickle(safe_pickle.AllowList):
    def persistent_load(self, key: Any) -> Any:
        return key[1]  # ("storage", type, name, device, elements): the type stands for its dtype


class _View(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise EOFError("cut off")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        content = os.pread(self._file, wanted, self._offset + self._place)
        self._place += len(content)
        return content
