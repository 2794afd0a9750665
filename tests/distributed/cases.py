"""What runs on every rank. Each returns plain values to the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import load_model_spec
from tests.distributed import reference


def start(folder: Path, layout: ParallelConfig) -> Any:
    from lens_megatron.mcore import runtime

    spec = load_model_spec(str(folder))
    runtime.initialize(spec, layout, timeout_s=60)
    return spec


def score(
    folder: Path,
    layout: ParallelConfig,
    sequences: Sequence[Tensor],
    budget: int,
    temperature: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor]]:
    from lens_megatron.mcore.step import build_frozen

    spec = start(folder, layout)
    result = build_frozen(spec, layout, folder, dtype=dtype).score(sequences, budget, temperature)
    return result.logprobs, result.entropies


def order_of_keys_built(folder: Path, layout: ParallelConfig, sequences: Sequence[Tensor], budget: int) -> list[int]:
    """How often, in how many packs, of how many layers."""
    from lens_megatron.mcore import attention
    from lens_megatron.mcore.pipeline import plan_for_this_layout
    from lens_megatron.mcore.step import build_frozen

    spec = start(folder, layout)
    model = build_frozen(spec, layout, folder)
    built = []

    def counted(*arguments: Any) -> Any:
        built.append(arguments)
        return original(*arguments)

    original = attention.seen_by_chunks
    with patch.object(attention, "seen_by_chunks", counted):
        model.score(sequences, budget)
    packs = plan_for_this_layout([len(sequence) for sequence in sequences], budget, model.config)
    return [len(built), len(packs), spec.layers]


def _policy(folder: Path, layout: ParallelConfig, memory: Any = None) -> Any:
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable

    spec = start(folder, layout)
    settings = OptimizerConfig(
        lr=reference.LR, eps=reference.EPS, clip_grad=reference.CLIP, weight_decay=reference.DECAY
    )
    return build_trainable(spec, layout, folder, settings, steps=2, memory=memory)


def _loss(sequences: Sequence[Tensor], data: reference.LossData) -> Any:
    flat_old = torch.cat(data.old)
    offsets = torch.tensor([0, *[len(s) for s in sequences]]).cumsum(0)
    is_response = torch.cat([torch.arange(len(s)) >= start for s, start in zip(sequences, data.starts, strict=True)])
    advantages = torch.tensor(data.advantages)

    def loss(logp: Tensor, entropy: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        place = batch.target_T.clamp(min=0)
        mask = (batch.target_T >= 0) & is_response[place]
        values = reference.token_loss(logp, entropy, flat_old[place], advantages[batch.sequence_T])
        assert bool(((batch.target_T < 0) | (batch.target_T > offsets[batch.sequence_T])).all())
        return (values * mask).sum() / data.responses, {"tokens": mask.sum(), "longest/max": batch.packed.max_seqlen_q}

    return lambda logp, entropy, batch: _as_tensors(*loss(logp, entropy, batch))


def _as_tensors(value: Tensor, metrics: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    return value, {name: torch.as_tensor(metric) for name, metric in metrics.items()}


def gradients(
    folder: Path,
    layout: ParallelConfig,
    sequences: Sequence[Tensor],
    data: reference.LossData,
    budget: int,
    recompute: str = "none",
) -> tuple[dict[str, float], dict[str, Tensor], float]:
    """Metrics, HF-named gradients, and how far replicas of one gradient lie apart, on rank 0."""
    from lens_megatron.mcore.settings import MemoryConfig
    from lens_megatron.mcore.step import accumulate_gradients

    policy = _policy(folder, layout, MemoryConfig(recompute=recompute))  # type: ignore[arg-type]
    return named_gradients(policy, lambda: accumulate_gradients(policy, sequences, _loss(sequences, data), budget))


def named_gradients(
    policy: Any, accumulate: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], dict[str, Tensor], float]:
    """What `accumulate` returned, HF-named gradients, and how far replicas of one gradient lie apart."""
    from lens_megatron.mcore.hf_bridge import local_tensors
    from lens_megatron.mcore.hf_slices import join_shards

    # the whole gradient on every data-parallel rank, not only each rank's part
    finish = policy.config.finalize_model_grads_func
    policy.config.finalize_model_grads_func = lambda chunks, tokens, **options: finish(
        chunks, tokens, **{**options, "force_all_reduce": True}
    )
    metrics = accumulate()
    policy.config.finalize_model_grads_func = finish
    mine = [
        (local.mapping, local.shard, local.shards, local.parameter.main_grad.clone())
        for local in local_tensors(policy.chunks, policy.spec)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    shards: dict[tuple[Any, int], list[Tensor]] = {}
    count = {}
    for part in gathered:
        for mapping, shard, ranks, gradient in part:
            shards.setdefault((mapping, shard), []).append(gradient)
            count[mapping] = ranks
    spread = max(float((copy - copies[0]).abs().max()) for copies in shards.values() for copy in copies)
    named: dict[str, Tensor] = {}
    for mapping, ranks in count.items():
        named.update(join_shards(mapping, policy.spec, [shards[mapping, rank][0] for rank in range(ranks)]))
    return metrics, named, spread


def two_updates(
    folder: Path, layout: ParallelConfig, sequences: Sequence[Tensor], data: reference.LossData, budget: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Gradient norms before clipping, and the weights."""
    from lens_megatron.mcore.step import train_step

    policy = _policy(folder, layout)
    norms = []
    for _ in range(2):
        result = train_step(policy, sequences, _loss(sequences, data), tokens_per_microbatch=budget)
        assert result.updated
        assert result.learning_rate == reference.LR
        norms.append(result.grad_norm)
    return norms, dict(policy.export_hf())


def two_overlapped_updates(*arguments: Any) -> tuple[list[float], dict[str, Tensor]]:
    """As on a GPU: each bucket's gradients are summed while backward still runs, all but the first step's."""
    from lens_megatron.mcore import optimizer

    usual, optimizer.can_overlap = optimizer.can_overlap, lambda: True
    try:
        return two_updates(*arguments)
    finally:
        optimizer.can_overlap = usual


def export(folder: Path, layout: ParallelConfig, target: Path) -> None:
    from lens_megatron.mcore.hf_files import write_hf_folder
    from lens_megatron.mcore.step import build_frozen

    spec = start(folder, layout)
    tensors = build_frozen(spec, layout, folder).export_hf()
    if dist.get_rank() == 0:
        write_hf_folder(target, tensors, companions_from=folder, max_shard_bytes=20_000)
    else:
        for _ in tensors:
            raise AssertionError("only rank 0 receives tensors")


def bf16_update(
    folder: Path, layout: ParallelConfig, sequences: Sequence[Tensor], data: reference.LossData, budget: int
) -> tuple[float, float, dict[str, Tensor]]:
    """Share of bf16 weights that one small update changed, share of fp32 main weights, and the exported weights."""
    from lens_megatron.mcore.optimizer import optimizer_parts
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable, train_step

    spec = start(folder, layout)
    settings = OptimizerConfig(lr=1e-6)
    policy = build_trainable(spec, layout, folder, settings, steps=1, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in policy.export_hf()}
    main = [
        parameter
        for part in optimizer_parts(policy.optimizer.inner)
        for group in part.shard_fp32_from_float16_groups
        for parameter in group
    ]
    main_before = [parameter.clone() for parameter in main]
    assert main and all(parameter.dtype == torch.float32 for parameter in main)
    result = train_step(policy, sequences, _loss(sequences, data), tokens_per_microbatch=budget)
    assert result.updated
    after = dict(policy.export_hf())
    changed = sum(int((after[name] != before[name]).sum()) for name in after)
    main_changed = sum(int((now != then).sum()) for now, then in zip(main, main_before, strict=True))
    total = sum(parameter.numel() for parameter in main)
    return changed / max(1, sum(t.numel() for t in after.values())), main_changed / total, after


def replicas_that_differ(folder: Path, layout: ParallelConfig, spoiled: str) -> list[str]:
    """What the guard names when the last rank's parameter `spoiled` has two elements that changed places; "": none has."""
    from lens_megatron.mcore.checksums import differing_replicas
    from lens_megatron.mcore.step import build_frozen

    model = build_frozen(start(folder, layout), layout, folder, dtype=torch.float32)
    if spoiled and dist.get_rank() == dist.get_world_size() - 1:
        names = dict(model.chunks[-1].named_parameters())
        weight = next(parameter for name, parameter in names.items() if name.endswith(spoiled)).data
        weight[0, :2] = weight[0, :2].flip(0)
    return differing_replicas(model)


def checksums_of(folder: Path, layout: ParallelConfig) -> dict[str, int]:
    from lens_megatron.mcore.checksums import state_checksums
    from lens_megatron.mcore.settings import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable

    spec = start(folder, layout)
    return state_checksums(build_trainable(spec, layout, folder, OptimizerConfig(), steps=1, dtype=torch.bfloat16))
