"""What the benchmarks of speed measure on: models with random weights, lengths of a math run, padding instead of packs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens_megatron.precision import torch_dtype

if TYPE_CHECKING:  # the head's benchmarks run where Megatron-Core is missing
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.mcore.packing import Pack
    from lens_megatron.mcore.settings import HeadKind, Recompute
    from lens_megatron.mcore.step import Trainable
    from lens_megatron.model_spec import ModelSpec


def math_lengths(total: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths of prompt and response, `total` tokens or a little less in all.

    Responses log-normal around a third of `longest` (sigma 0.6), as reasoning before an answer spreads in math runs;
    what would be longer is cut off there, prompts included.
    """
    generator = random.Random(seed)
    lengths: list[int] = []
    while True:
        length = min(longest, max(4, round(longest * 0.3 * generator.lognormvariate(0, 0.6) + longest * 0.03)))
        if sum(lengths) + length > total:
            return lengths or [min(total, longest)]
        lengths.append(length)


def random_sequences(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def padded_packs(lengths: Sequence[int], budget: int) -> list[Pack]:
    """Micro-batches without packing: sorted by length, each padded to its longest, longest x count within the budget."""
    from lens_megatron.mcore.packing import Pack

    packs: list[Pack] = []
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if members and (len(members) + 1) * lengths[index] > budget:
            packs.append(Pack(tuple(members), (lengths[members[-1]],) * len(members)))
            members = []
        members.append(index)
    return [*packs, Pack(tuple(members), (lengths[members[-1]],) * len(members))] if members else packs


def random_policy(
    spec: ModelSpec,
    recompute: Recompute = "none",
    head: HeadKind = "torch",
    dtype: torch.dtype | None = None,
    layout: ParallelConfig | None = None,
    offload_optimizer: float = 0.0,
) -> Trainable:
    """A policy of that shape, by default on one process; its weights are drawn instead of loaded."""
    from lens_megatron.mcore import runtime
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.mcore.model import build_chunks, transformer_config
    from lens_megatron.mcore.optimizer import build_optimizer, with_gradient_buffers
    from lens_megatron.mcore.settings import MemoryConfig, OptimizerConfig
    from lens_megatron.mcore.step import Trainable

    layout = layout or ParallelConfig()
    memory = MemoryConfig(recompute=recompute, head=head, offload_optimizer=offload_optimizer)
    runtime.initialize(spec, layout)
    config = transformer_config(spec, layout, dtype or torch_dtype(), memory)
    chunks = build_chunks(spec, config, memory)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    wrapped = with_gradient_buffers(chunks, config)
    return Trainable(spec, config, wrapped, build_optimizer(wrapped, config, OptimizerConfig(), memory, steps=1000))


def train_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Of one training pass over sequences of these lengths: products with weights, and causal attention. No recompute."""
    attention = spec.heads * spec.head_dim
    a_layer = spec.hidden_size * (2 * attention + 2 * spec.kv_heads * spec.head_dim + 3 * spec.ffn_size)
    weights = spec.layers * a_layer + spec.hidden_size * spec.vocab_size
    # forward: 2 products of length x length / 2 a head; backward twice that
    return sum(6.0 * weights * n + 6.0 * spec.layers * attention * n * n for n in lengths)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Wall time on an idle device; every pass is waited for."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
