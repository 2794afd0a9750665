"""How long the engine takes for a batch of rollouts: decoding is bound by memory, by arithmetic, or by the longest response.

At a token step every running response reads the weights (all of them together, once) and its own keys and values. As
responses end, fewer run, until the longest is done; while more wait than a server has room for, the room stays full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.gpus import Rates
from lens_megatron.planning.parameters import count_active_parameters, count_parameters
from lens_megatron.planning.work import Workload, kv_bytes_a_token, share_longer, token_flops

_STEP_OVERHEAD_S = 0.002  # scheduling and sampling of one token step; assumed
_LAYER_OVERHEAD_S = 15e-6  # launches, and small all-reduces with tp > 1; assumed
_POINTS = 48


@dataclass(frozen=True)
class Generation:
    seconds: float
    tokens: float
    waves: float  # how many times a server's room was filled; below 1 all run at once
    limit: str


def decode_step_seconds(spec: ModelSpec, rates: Rates, tp: int, running: float, context: float) -> tuple[float, str]:
    """One token of each of `running` responses on one server."""
    weights = 2 * _weights_read(spec, running) / tp
    cache = running * context * kv_bytes_a_token(spec, tp)
    memory = (weights + cache) / rates.bandwidth
    arithmetic = running * token_flops(spec).forward(context) / (tp * rates.matmul)
    overhead = _STEP_OVERHEAD_S + spec.layers * _LAYER_OVERHEAD_S
    busy = max(memory, arithmetic)
    if busy < overhead:
        return overhead + busy, "launch overhead"
    if arithmetic > memory:
        return overhead + busy, "arithmetic"
    return overhead + busy, "reading keys and values" if cache > weights else "reading weights"


def _weights_read(spec: ModelSpec, running: float) -> float:
    """With experts, those that at least one response chose."""
    total = count_parameters(spec)
    if spec.moe is None:
        return total
    idle = (1 - spec.moe.experts_per_token / spec.moe.experts) ** running
    unused = total - count_active_parameters(spec)
    all_experts = unused * spec.moe.experts / (spec.moe.experts - spec.moe.experts_per_token or 1)
    return total - idle * all_experts


@lru_cache(maxsize=1024)
def generate(spec: ModelSpec, rates: Rates, work: Workload, servers: int, tp: int, slots: float) -> Generation:
    """Originals and rescues. `slots`: responses that a server has room for."""
    originals = work.rollouts / servers
    rescues = work.purified_rollouts / servers
    if work.schedule == "speculative" or not rescues:  # as if all began together: idle slots take the rescues
        parts: Sequence[float] = [originals + rescues]
    else:  # rescues begin when their group is done; the longest original decides
        parts = [originals, rescues]
    results = [_batch(spec, rates, work, count, servers, tp, slots) for count in parts]
    prefill = work.rollouts / work.n / servers * (1 + work.rescued) * work.prompt_tokens
    seconds = sum(one.seconds for one in results)
    seconds += prefill * token_flops(spec).forward(work.prompt_tokens / 2) / (tp * rates.matmul)
    tokens = (work.rollouts + work.purified_rollouts) * work.response_tokens
    longest = max(results, key=lambda one: one.seconds)
    return Generation(seconds, tokens, longest.waves, longest.limit)


def _batch(
    spec: ModelSpec, rates: Rates, work: Workload, count: float, servers: int, tp: int, slots: float
) -> Generation:
    """`count` responses on each of the servers; the batch is done when the longest of all is."""
    mean_context = work.prompt_tokens + work.response_tokens / 2
    running = min(count, slots)
    seconds, waiting = 0.0, count - running
    if waiting > 0:
        step, _ = decode_step_seconds(spec, rates, tp, running, mean_context)
        seconds += waiting * work.response_tokens / running * step
    width = work.longest_response / _POINTS
    spent: dict[str, float] = {}
    for point in range(_POINTS):
        middle = (point + 0.5) * width
        alive = running * share_longer(middle, work.response_tokens, work.longest_response)
        if alive * servers < 0.5:
            break
        step, limit = decode_step_seconds(spec, rates, tp, max(1.0, alive), work.prompt_tokens + middle)
        label = "the longest responses" if alive < 0.25 * running else limit
        spent[label] = spent.get(label, 0.0) + width * step
    limit = max(spent, key=lambda name: spent[name]) if spent else "nothing to generate"
    total = seconds + sum(spent.values())
    if seconds > 0.5 * total:
        limit = "room for keys and values"
    return Generation(total, count * work.response_tokens, count / max(1.0, running), limit)
