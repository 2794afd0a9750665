"""Element types of files, without torch: its import takes longer than copying a small model."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    name: str  # torch's, as in torch.bfloat16
    itemsize: int
    safetensors: str
    storage: str  # the class that torch's pickles name


_KNOWN = (
    Dtype("float64", 8, "F64", "DoubleStorage"),
    Dtype("float32", 4, "F32", "FloatStorage"),
    Dtype("float16", 2, "F16", "HalfStorage"),
    Dtype("bfloat16", 2, "BF16", "BFloat16Storage"),
    Dtype("int64", 8, "I64", "LongStorage"),
    Dtype("int32", 4, "I32", "IntStorage"),
    Dtype("int16", 2, "I16", "ShortStorage"),
    Dtype("int8", 1, "I8", "CharStorage"),
    Dtype("uint8", 1, "U8", "ByteStorage"),
    Dtype("bool", 1, "BOOL", "BoolStorage"),
)
BY_NAME = {dtype.name: dtype for dtype in _KNOWN}
BY_STORAGE = {dtype.storage: dtype for dtype in _KNOWN}
BY_SAFETENSORS = {BY_NAME[name].safetensors: BY_NAME[name] for name in ("float64", "float32", "float16", "bfloat16")}
