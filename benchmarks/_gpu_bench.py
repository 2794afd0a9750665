"""What all parts of benchmarks/gpu.py share: sizes, the rate that shares are taken of, rows that survive a failure."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the head's benchmarks run where Megatron-Core is missing
    from lens_megatron.mcore.settings import HeadKind

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured; the smoke test's is the same in small."""

    matmul: int = 8192
    hidden: int = 4096
    vocabulary: int = 151_936
    tokens: tuple[int, ...] = (8192, 16_384, 32_768, 65_536)
    tile_tokens: int = 16_384
    correct: tuple[int, int, int] = (300, 512, 5003)  # tokens, hidden, vocabulary
    repeats: int = 5
    models: tuple[str, ...] = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b-base")
    budgets: tuple[int, ...] = (4096, 16_384)
    packs: int = 4  # micro-batches in a step, about
    prompts: int = 512
    prompt_tokens: int = 200
    scoring_model: str = "qwen3-4b-base"
    saved_model: str = "qwen3-0.6b"


SMOKE = Size(
    matmul=64,
    hidden=64,
    vocabulary=515,
    tokens=(24, 40),
    tile_tokens=20,
    correct=(11, 32, 131),
    repeats=1,
    models=("tiny-qwen3-tied",),
    budgets=(64,),
    packs=2,
    prompts=5,
    prompt_tokens=9,
    scoring_model="tiny-qwen3",
    saved_model="tiny-qwen3",
)


class Bench:
    """The size, and the rate that every share is taken of."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.gpu = torch.cuda.is_available()
        self.where = torch.device("cuda" if self.gpu else "cpu")
        self.rate: float | None = None  # FLOP/s
        self.best_head: HeadKind | None = None  # once it is known

    def share(self, flops: float, seconds: float) -> float | None:
        return round(flops / seconds / self.rate, 3) if self.rate else None

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=self.where, dtype=torch.float32).mul_(scale).to(torch.bfloat16)


_STARTED: list[Any] = []  # patches that hold until a forward and its backward pass are done


def until_stopped(patch: Any) -> None:
    patch.start()
    _STARTED.append(patch)


def stop_patches() -> None:
    while _STARTED:
        _STARTED.pop().stop()


def guarded(work: Callable[[], Row]) -> Row:
    """Its row, or why there is none."""
    try:
        return work()
    except torch.OutOfMemoryError:  # a result: what holds all logits cannot hold many
        stop_patches()
        free()
        return {"out of memory": True}
    except Exception as error:
        stop_patches()
        free()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}


def guarded_rows(work: Callable[[], list[Row]]) -> list[Row]:
    result: list[Row] = []

    def fill() -> Row:
        result.extend(work())
        return {}

    failure = guarded(fill)
    return [*result, failure] if failure else result


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def tera(flops: float) -> float:
    return round(flops / 1e12, 3)


def short(value: float) -> float:
    return float(f"{value:.2e}")


def table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
