"""What packing and the head without logits are worth, as ratios on a CPU: a regression shows without a GPU.

    python -m benchmarks.step_cpu [--json benchmarks/results/step_cpu.json] [--rounds 5]

In a round the rivals take turns on the same work; a ratio is the median over the rounds of CPU seconds. The model is
small (hidden 256, 4 layers, vocabulary 16,000), in fp32, on one thread: the ratios are not those of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._machine import machine
from benchmarks._work import math_lengths, padded_packs, random_policy, random_sequences
from benchmarks.head_memory import materialised, peak_bytes
from lens_megatron.mcore import step
from lens_megatron.mcore.head import token_logprobs_and_entropy
from lens_megatron.model_spec import ModelSpec

SPEC = ModelSpec(
    family="qwen3",
    layers=4,
    hidden_size=256,
    ffn_size=768,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab_size=16_000,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=4096,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
)


def turns(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each rival in each round."""
    for work in rivals.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, work in rivals.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, Any]:
    each = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return {
        "ratio": round(statistics.median(each), 3),
        "lowest": round(min(each), 3),
        "highest": round(max(each), 3),
        **{f"{name} CPU s": round(statistics.median(seconds[name]), 3) for name in (slow, fast)},
    }


def packed_against_padded(spec: ModelSpec, budget: int, packs: int, rounds: int) -> dict[str, Any]:
    policy = random_policy(spec)
    lengths = math_lengths(packs * budget, budget // 2)
    sequences = random_sequences(lengths, spec.vocab_size)

    def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
        return -torch.where(pack.target_T >= 0, logprobs_T, 0.0).sum() / sum(lengths), {}

    def train() -> object:
        return step.train_step(policy, sequences, loss, tokens_per_microbatch=budget)

    def train_padded() -> object:
        with patch.object(step, "plan_for_this_layout", lambda n, b, config: padded_packs(n, b)):
            return train()

    padded = sum(pack.tokens for pack in padded_packs(lengths, budget))
    return {
        "budget": budget,
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "padded tokens": padded,
        "token ratio": round(padded / sum(lengths), 3),
        **ratio(turns({"padded": train_padded, "packed": train}, rounds), "padded", "packed"),
    }


def chunked_against_materialised(tokens: int, hidden: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    w = torch.randn(vocabulary, hidden, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)

    def passes(head: Callable[..., Any]) -> Callable[[], object]:
        def work() -> object:
            logprobs, entropy = head(h, w, labels)
            return torch.autograd.grad((logprobs + 0.01 * entropy).sum(), (h, w))

        return work

    rivals = {"materialised": passes(materialised), "chunked": passes(token_logprobs_and_entropy)}
    memory = {name: peak_bytes(work) for name, work in rivals.items()}
    return {
        "shape": f"{tokens} x {hidden} x {vocabulary}",
        **ratio(turns(rivals, rounds), "materialised", "chunked"),
        "memory ratio": round(memory["materialised"] / memory["chunked"], 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="packing and the head without logits, as ratios on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="of the head")
    parser.add_argument("--json", metavar="F")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {
        **machine(),
        "threads": 1,
        "rounds": arguments.rounds,
        "packed": packed_against_padded(SPEC, arguments.budget, 4, arguments.rounds),
        "head": chunked_against_materialised(arguments.tokens, 256, 32_000, arguments.rounds),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
