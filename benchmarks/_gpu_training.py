"""Training, scoring, weights to the host and checkpoints on a GPU, of whole models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._gpu_bench import Bench, Row, free, guarded_rows
from benchmarks._gpu_heads import best_head
from benchmarks._work import median_seconds, synchronize

if TYPE_CHECKING:  # a failure to import Megatron-Core is a part's, not all parts'
    from lens_megatron.mcore.settings import Recompute

_DATASHEET_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


def step(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    for name in bench.size.models:
        for budget in bench.size.budgets:
            for recompute in ("none", "light", "selective", "full"):
                found = guarded_rows(partial(_train, bench, name, budget, recompute))
                free()
                if any("out of memory" in row for row in found) and recompute != "full":
                    continue  # the next one holds less
                rows += [{"model": name, "budget": budget, "recompute": recompute, **row} for row in found]
                break
    return rows


def _train(bench: Bench, name: str, budget: int, recompute: Recompute) -> list[Row]:
    from unittest.mock import patch

    from benchmarks._work import math_lengths, random_policy, random_sequences, train_flops
    from lens_megatron.mcore import step
    from lens_megatron.mcore.pipeline import plan_for_this_layout
    from lens_megatron.model_spec import load_model_spec

    spec = load_model_spec(name)
    policy = random_policy(spec, recompute, best_head(bench))
    lengths = math_lengths(bench.size.packs * budget, budget // 4)
    sequences = random_sequences(lengths, spec.vocab_size)
    flops = train_flops(spec, lengths)

    def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
        return -torch.where(pack.target_T >= 0, logprobs_T, 0.0).sum() / sum(lengths), {}

    def one() -> Any:
        return step.train_step(policy, sequences, loss, tokens_per_microbatch=budget)

    rows: list[Row] = []
    for how in ("packed", "padded"):
        plan = plan_for_this_layout if how == "packed" else _padded
        packs = plan(lengths, budget, policy.config)
        with patch.object(step, "plan_for_this_layout", plan):
            seconds = median_seconds(one, min(3, bench.size.repeats))
        row: Row = {
            "head": best_head(bench),
            "how": how,
            "tokens": sum(lengths),
            "with padding": sum(pack.tokens for pack in packs),
            "s": round(seconds, 4),
            "tokens/s": round(sum(lengths) / seconds),
            "share": bench.share(flops, seconds),
        }
        sheet = _DATASHEET_BF16.get(torch.cuda.get_device_name()) if bench.gpu else None
        if sheet:
            row["mfu"] = round(flops / seconds / sheet, 3)
        rows.append(row)
    rows[0]["packed/padded"] = round(rows[1]["s"] / rows[0]["s"], 3)
    return rows


def _padded(lengths: Sequence[int], budget: int, config: Any) -> Any:
    from benchmarks._work import padded_packs

    return padded_packs(lengths, budget)


def scoring(bench: Bench) -> list[Row]:
    from benchmarks._work import random_policy, random_sequences
    from lens_megatron.model_spec import load_model_spec

    spec = load_model_spec(bench.size.scoring_model)
    policy = random_policy(spec, head=best_head(bench))
    prompts = random_sequences([bench.size.prompt_tokens] * bench.size.prompts, spec.vocab_size)
    budget = max(bench.size.budgets)
    seconds = median_seconds(lambda: policy.score(prompts, budget, entropy=False), min(3, bench.size.repeats))
    tokens = sum(map(len, prompts))
    row: Row = {"model": bench.size.scoring_model, "head": best_head(bench), "prompts": len(prompts)}
    return [{**row, "tokens/s": round(tokens / seconds)}]


def export(bench: Bench) -> list[Row]:
    from benchmarks._work import random_policy
    from lens_megatron.model_spec import load_model_spec

    policy = random_policy(load_model_spec(bench.size.scoring_model))
    parameters = [p.detach() for chunk in policy.chunks for p in chunk.parameters()]
    held = sum(p.numel() * p.element_size() for p in parameters)

    def export() -> None:
        for _ in policy.export_hf():
            pass

    copies = [torch.empty_like(p) for p in parameters]

    def copy() -> None:
        for target, parameter in zip(copies, parameters, strict=True):
            target.copy_(parameter)

    out, device_copy = median_seconds(export, 2), median_seconds(copy, 5)
    return [
        {
            "model": bench.size.scoring_model,
            "GB": round(held / 1e9, 3),
            "export GB/s": round(held / out / 1e9, 2),
            "device copy GB/s": round(held / device_copy / 1e9, 1),
        }
    ]


def checkpoint(bench: Bench) -> list[Row]:
    from benchmarks._work import random_policy
    from lens_megatron.checkpoints import CheckpointConfig
    from lens_megatron.mcore.checkpoint_run import Saver
    from lens_megatron.model_spec import load_model_spec

    policy = random_policy(load_model_spec(bench.size.saved_model))
    rows = []
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(policy, Path(folder), CheckpointConfig(asynchronous=asynchronous))
            synchronize()
            start = time.perf_counter()
            stall = saver.save(1, {})
            saver.finish()
            seconds = time.perf_counter() - start
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        rows.append(
            {
                "model": bench.size.saved_model,
                "asynchronous": asynchronous,
                "GB": round(size / 1e9, 3),
                "s": round(seconds, 2),
                "stall s": round(stall, 2),
            }
        )
    return rows
