"""Recording and replaying experts, on every rank. Each returns plain values to the test."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.routed_experts import Routing
from lens_megatron.types import Sample
from tests.distributed import cases, reference


def record(
    folder: Path, layout: ParallelConfig, sequences: Sequence[Tensor], budget: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs, and the experts that gave them."""
    from lens_megatron.mcore.step import build_frozen
    from tests.distributed.recorded_routing import record_routing

    model = build_frozen(cases.start(folder, layout), layout, folder)
    with record_routing(model.chunks, sequences) as seen:
        logprobs = model.score(sequences, budget).logprobs
    again = model.score(sequences, budget).logprobs  # nothing stays behind
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(logprobs, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen.result(), seen.result(), strict=True))
    return logprobs, seen.result()


def replay(
    folder: Path,
    layout: ParallelConfig,
    sequences: Sequence[Tensor],
    data: reference.LossData,
    budget: int,
    routing: Sequence[Routing | None] | None,
    recompute: str = "none",
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probs and HF-named gradients with these experts.

    A second model is built in between: its routers must not take this one's experts.
    """
    from lens_megatron.mcore.routing import replay_routing
    from lens_megatron.mcore.settings import MemoryConfig
    from lens_megatron.mcore.step import accumulate_gradients, build_frozen

    spec = cases.start(folder, layout)
    model = build_frozen(spec, layout, folder)
    other = build_frozen(spec, layout, folder)
    untouched = other.score(sequences, budget).logprobs

    def replaying(chunks: Any) -> Any:
        return contextlib.nullcontext() if routing is None else replay_routing(chunks, sequences, routing)

    with replaying(model.chunks):
        logprobs = model.score(sequences, budget).logprobs
        while_replaying = other.score(sequences, budget).logprobs
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(untouched, while_replaying, strict=True))
    on_engine = recompute == "light on Transformer Engine"  # whose recomputation leaves out the router
    policy = cases._policy(folder, layout, MemoryConfig(recompute="none" if on_engine else recompute))  # type: ignore[arg-type]
    if on_engine:
        policy.config.recompute_granularity, policy.config.recompute_modules = "selective", ["layernorm", "moe_act"]

    def accumulate() -> dict[str, float]:
        with replaying(policy.chunks):
            return accumulate_gradients(policy, sequences, cases._loss(sequences, data), budget)

    _, gradients, _ = cases.named_gradients(policy, accumulate)
    return logprobs, gradients


def updated(
    folder: Path, layout: ParallelConfig, groups: list[list[Sample]], budget: int, reuse: bool
) -> tuple[list[Tensor | None], list[Tensor], dict[str, float]]:
    """pi_old of every sample, log pi(y | x), and the metrics of an update, all with the samples' experts."""
    from lens_megatron.diagnostics import response_logprobs
    from lens_megatron.mcore.settings import MemoryConfig
    from lens_megatron.presets import load_algorithm
    from lens_megatron.update import evaluate_samples, update_policy
    from lens_megatron.update_config import UpdateConfig

    cases.start(folder, layout)
    policy = cases._policy(folder, layout, MemoryConfig(recompute="full"))
    loss = load_algorithm({"preset": "lens", "loss": {"kl_coef": 0.0}}).loss
    update = UpdateConfig(tokens_per_microbatch=budget, reuse_logprobs=reuse)
    evaluated = evaluate_samples(groups, policy, None, loss, update, 1.0)
    every = [e for group in evaluated for e in group]
    under_x = response_logprobs(policy, every, update, 1.0)
    return [e.proximal_R for e in every], under_x, update_policy(policy, evaluated, loss, update, 1.0)


def refused(folder: Path, sequences: Sequence[Tensor], budget: int, routing: Sequence[Routing | None]) -> str:
    from lens_megatron.errors import RunError
    from lens_megatron.mcore.routing import replay_routing
    from lens_megatron.mcore.step import build_frozen

    layout = ParallelConfig()
    model = build_frozen(cases.start(folder, layout), layout, folder)
    try:
        with replay_routing(model.chunks, sequences, routing):
            model.score(sequences, budget)
    except RunError as error:
        return str(error)
    return "accepted"


def parity_in_bf16(folder: Path, layout: ParallelConfig, swap: bool) -> tuple[list[str], float, float]:
    """What the guards after loading say of a bf16 model, without and with two experts of a layer that changed places; and the
    mean differences from the HF files where routers choose for themselves, and where they are given the files' experts."""
    from lens_megatron.guards import checks
    from lens_megatron.guards.config import ModelGuardConfig
    from lens_megatron.guards.run_guards import ModelGuards
    from lens_megatron.guards.streamed import streamed_logprobs
    from lens_megatron.mcore.routing import replay_routing
    from lens_megatron.mcore.step import build_frozen

    spec = cases.start(folder, layout)
    model = build_frozen(spec, layout, folder, dtype=torch.bfloat16)
    if swap:
        experts = dict(model.chunks[0].named_parameters())
        names = sorted(n for n in experts if "layers.0." in n and "linear_fc1" in n and "local_experts" in n)
        with torch.no_grad():
            first = experts[names[0]].clone()
            experts[names[0]].copy_(experts[names[1]])
            experts[names[1]].copy_(first)
    said = []
    try:
        ModelGuards(ModelGuardConfig(), 512, 60.0).after_loading(model, "policy", folder)
    except checks.GuardFailed as error:
        said.append(str(error))
    probe = checks.probe_text(spec.vocab_size, 128)
    expected_T, experts = streamed_logprobs(folder, probe)
    sequences = [torch.tensor(probe)]
    own_T = model.score(sequences, 512).logprobs[0][1:]
    with replay_routing(model.chunks, sequences, [experts]):
        replayed_T = model.score(sequences, 512).logprobs[0][1:]
    return said, float((own_T - expected_T).abs().mean()), float((replayed_T - expected_T).abs().mean())
