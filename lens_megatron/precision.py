"""`precision:` of the configs, as a dtype. torch is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]  # auto: bf16 on GPU; on CPU fp32, in which layouts can be compared to 1e-6


def dtype_name(precision: Precision = "auto") -> str:
    """As torch, config.json and SGLang spell it."""
    if precision == "auto":
        import torch

        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return {"fp32": "float32", "bf16": "bfloat16"}[precision]


def whole_products() -> None:
    """fp32 is multiplied as fp32: NVIDIA's containers set a variable with which torch takes ten bits of it (TF32)."""
    import torch

    torch.set_float32_matmul_precision("highest")


def torch_dtype(precision: Precision = "auto") -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name(precision))
    return dtype
