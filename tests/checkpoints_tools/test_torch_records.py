"""Archives that torch.load reads, and bytes found in archives that torch.save wrote."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools.torch_records import find_bytes, frame, plain_archive
from lens_megatron.errors import UsageError
from lens_megatron.mcore.stored_dtypes import BY_NAME, Dtype

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8]
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def stored(dtype: torch.dtype) -> Dtype:
    return BY_NAME[str(dtype).removeprefix("torch.")]


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 97).reshape(shape).to(dtype)


@given(SHAPES, st.sampled_from(DTYPES))
def test_torch_loads_a_framed_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, around = filled(shape, dtype), frame(shape, stored(dtype))
    written = around.head + content(tensor) + around.tail
    assert len(written) == around.size
    loaded = torch.load(io.BytesIO(written), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape and torch.equal(loaded, tensor)
    assert len(around.head) % 64 == 0  # aligned for a reader that maps the file


@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 3), st.booleans())
def test_bytes_of_a_saved_tensor_are_found(
    shape: tuple[int, ...], dtype: torch.dtype, before: int, framed: bool
) -> None:
    tensor = filled(shape, dtype)
    stream = io.BytesIO(b"x" * before)
    stream.seek(before)
    if framed:
        around = frame(shape, stored(dtype))
        stream.write(around.head + content(tensor) + around.tail)
    else:
        # a view: torch.save keeps the whole storage, and the tensor begins inside it
        torch.save(torch.cat([tensor, tensor])[shape[0] :], stream)
    handle = os.memfd_create("records")
    os.write(handle, stream.getvalue() + b"after")
    found = find_bytes(handle, before, len(stream.getvalue()) - before, "here")
    assert (found.dtype, found.shape) == (stored(dtype), shape)
    assert os.pread(handle, len(content(tensor)), found.offset) == content(tensor)
    os.close(handle)


def test_tensors_over_4_gib_are_framed_and_found(tmp_path: Path) -> None:
    shape, path = (3 << 20, 1024), tmp_path / "large"
    around = frame(shape, BY_NAME["bfloat16"])
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(handle, around.size)  # sparse: nothing but the frame takes room
    os.pwrite(handle, around.head, 0)
    os.pwrite(handle, b"\x80\x3f", len(around.head) + around.data_bytes - 2)
    os.pwrite(handle, around.tail, len(around.head) + around.data_bytes)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == shape and loaded[-1, -1] == 1 and loaded[-1, -2] == 0
    assert find_bytes(handle, 0, around.size, "here").offset == len(around.head)
    os.close(handle)


def damaged_file(stored: bytes) -> int:
    handle = os.memfd_create("damaged")
    os.write(handle, stored)
    return handle


def test_what_is_no_tensor_is_refused() -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(3, 4).T, stream)
    with pytest.raises(UsageError, match="not stored contiguously"):
        find_bytes(damaged_file(stream.getvalue()), 0, len(stream.getvalue()), "here")
    with pytest.raises(UsageError, match="here: no tensor archive at byte 0"):
        find_bytes(damaged_file(b"nothing of the kind" * 9), 0, 171, "here")
    short = io.BytesIO()
    torch.save(torch.ones(3, 4), short)
    with pytest.raises(UsageError, match="no tensor archive"):
        find_bytes(damaged_file(short.getvalue()[:-9]), 0, len(short.getvalue()) - 9, "here")
    attack = io.BytesIO()
    torch.save(os.system, attack)  # any class that a tensor has no use for
    with pytest.raises(UsageError, match=r"posix\.system|not readable|no tensor archive"):
        find_bytes(damaged_file(attack.getvalue()), 0, len(attack.getvalue()), "here")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_torch_loads_plain_values(value: object) -> None:
    assert torch.load(io.BytesIO(plain_archive(value)), weights_only=True) == value


def test_the_known_dtypes_are_torchs() -> None:
    for name, dtype in BY_NAME.items():
        tensor = torch.zeros(1, dtype=getattr(torch, name))
        assert dtype.itemsize == tensor.element_size()
        assert (
            type(tensor.storage()).__name__ == "TypedStorage"
            and tensor.storage().pickle_storage_type() == dtype.storage
        )
