"""Seconds of a step by phase. Every term is bytes or FLOPs over a rate; docs/planning.md has the formulas in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.mcore.settings import Recompute
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.activations import Kernels, Pass, kept_by_one_pass
from lens_megatron.planning.gpus import Gpu, Rates
from lens_megatron.planning.memory import StateBytes, state_bytes
from lens_megatron.planning.work import Workload, token_flops

_ELEMENT = 2
_TRAFFIC = 3.0  # bytes moved for each byte kept of a layer: written, read again, and what is not kept; assumed
# bytes an element: gradient, main weight and moments read, the three written, 16-bit copy; norm
_OPTIMIZER_TRAFFIC = 38.0
_GRADES_A_SECOND = 800.0  # of one worker; benchmarks/results/grading.json: 1,902 a second with two workers, on 2 cores
_REWARD_WORKERS = 8


@dataclass(frozen=True)
class TrainerTimes:
    """Of one kind of pass over the step's samples; `parts` of a training pass, in seconds."""

    seconds: float
    parts: dict[str, float]


def microbatch_count(layout: ParallelConfig, world: int, tokens: float, budget: int) -> int:
    """On each data-parallel rank. Packs are about nine tenths full."""
    dp = world // layout.model_ranks
    count = max(1, math.ceil(tokens / (0.9 * budget) / dp))
    unit = layout.pp if layout.vpp > 1 else 1
    return -(-count // unit) * unit


class PassTimes:
    """Passes of one model in one layout."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: ParallelConfig,
        world: int,
        gpu: Gpu,
        rates: Rates,
        kernels: Kernels,
        work: Workload,
    ) -> None:
        self.spec, self.layout, self.world = spec, layout, world
        self.gpu, self.rates, self.kernels, self.work = gpu, rates, kernels, work
        self.flops = token_flops(spec)
        budget = work.tokens_per_microbatch
        self.t = budget / layout.cp
        self.mean_length = work.prompt_tokens + work.response_tokens
        one = Pass(budget, (work.longest,) * max(1, budget // work.longest))
        self.kept = kept_by_one_pass(spec, layout, one, _ELEMENT, kernels)
        self.layers = spec.layers / layout.pp
        crosses_nodes = layout.tp > gpu.a_node
        self.tp_rate = rates.network if crosses_nodes else rates.link

    # one micro-batch on one stage

    def _compute(self, context: float) -> float:
        layers = self.t * self.flops.layers / self.layout.pp / self.layout.tp / self.rates.matmul
        attention = self.t * self.flops.attention * context / self.layout.pp / self.layout.tp / self.rates.attention
        traffic = _TRAFFIC * self.layers * self.kept.layer / self.rates.bandwidth
        return layers + attention + traffic

    def _made_again(self) -> float:
        """Norms and activations once more: memory traffic alone."""
        return _TRAFFIC * self.layers * self.kept.light / self.rates.bandwidth

    def _head(self) -> float:
        return self.t * self.flops.head / self.layout.tp / self.rates.matmul

    def _tensor(self) -> float:
        """All-gathers and reduce-scatters of a forward pass: two each a layer."""
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        return self.layers * 4 * (tp - 1) / tp * self.t * self.spec.hidden_size * _ELEMENT / self.tp_rate

    def _context(self) -> float:
        cp = self.layout.cp
        if cp == 1:
            return 0.0
        width = 2 * self.spec.kv_heads * self.spec.head_dim / self.layout.tp * _ELEMENT
        rate = self.rates.link if self.layout.tp * cp <= self.gpu.a_node else self.rates.network
        return self.layers * (cp - 1) * self.t * width / rate

    def _experts(self) -> float:
        """Two all-to-alls a layer."""
        ep, moe = self.layout.ep, self.spec.moe
        if ep == 1 or moe is None:
            return 0.0
        rate = self.rates.link if ep * self.layout.expert_tp <= self.gpu.a_node else self.rates.network
        copies = self.t / self.layout.tp * moe.experts_per_token
        return self.layers * 2 * (ep - 1) / ep * copies * self.spec.hidden_size * _ELEMENT / rate

    def _handed_on(self) -> float:
        if self.layout.pp == 1:
            return 0.0
        sent = self.t * self.spec.hidden_size * _ELEMENT / (self.layout.tp if self.layout.sequence_parallel else 1)
        return sent / self.rates.network

    # passes

    def forward_seconds(self, tokens: float, mean_length: float | None = None) -> float:
        """Log-probs of `tokens` tokens, nothing kept."""
        context = (mean_length or self.mean_length) / 2
        # a small pass does not fill its packs
        dp = self.world // self.layout.model_ranks
        count = microbatch_count(self.layout, self.world, tokens, self.work.tokens_per_microbatch)
        share = min(1.0, tokens / dp / (count * self.work.tokens_per_microbatch))
        layers = self._compute(context) + self._tensor() + self._context() + self._experts() + self._handed_on()
        last = self._head() + layers
        bubble = (self.layout.pp - 1) / self.layout.vpp
        return share * (count * last + bubble * layers)

    def training(self, recompute: Recompute, offload_optimizer: float = 0.0) -> TrainerTimes:
        """All updates of a step, by part."""
        work, layout = self.work, self.layout
        updates = work.minibatches * work.epochs
        tokens = work.trained_tokens / work.minibatches
        dp = self.world // layout.model_ranks
        count = microbatch_count(layout, self.world, tokens, work.tokens_per_microbatch)
        share = min(1.0, tokens / dp / (count * work.tokens_per_microbatch))
        compute = self._compute(self.mean_length / 2)
        again = {"selective": self.flops.mlp / self.flops.layers, "full": 1.0}.get(recompute, 0.0)
        made_again = self._made_again() if recompute == "light" else 0.0
        exchange = self._context() + self._experts()
        arithmetic = share * count * ((3 + again) * compute + made_again)
        recomputed = share * count * (again * compute + made_again)
        head = share * count * 4 * self._head()  # the backward pass makes the logits again
        # backward: as much again, and inputs gathered once more for the weights' gradients
        tensor = share * count * ((1 + 1.5 + again) * self._tensor() + (2 + again) * exchange + 2 * self._handed_on())
        bubble = (layout.pp - 1) / layout.vpp / count * (arithmetic + tensor)
        parts = {
            "arithmetic": arithmetic - recomputed,
            "recomputed": recomputed,
            "head": head,
            "exchange inside the model": tensor,
            "pipeline bubble": bubble,
            "data-parallel exchange": self._data_parallel(),
            "optimizer": self._optimizer(),
        }
        if offload_optimizer:  # there and back; not hidden behind the arithmetic here, which is far shorter
            parts["moments from the host"] = 2 * offload_optimizer * self._state().fullest.moments / self.rates.host
        parts = {name: updates * seconds for name, seconds in parts.items()}
        return TrainerTimes(sum(parts.values()), parts)

    def _data_parallel(self) -> float:
        """fp32 gradients scattered, 16-bit weights gathered; not hidden behind the backward pass here, on the safe side."""
        ranks = self.world // (self.layout.tp * self.layout.pp)
        if ranks == 1:
            return 0.0
        state = self._state()
        inside = self.world <= self.gpu.a_node
        rate = self.rates.link if inside else self.rates.network
        return (state.gradients + state.weights) * (ranks - 1) / ranks / rate

    def _optimizer(self) -> float:
        state = self._state()
        return state.fullest.moments / 8 * _OPTIMIZER_TRAFFIC / self.rates.bandwidth

    def _state(self) -> StateBytes:
        return state_bytes(self.spec, self.layout, self.world, 0, element=_ELEMENT, overlap=True)

    def reference_moves(self) -> float:
        """To the GPU; it leaves without being copied."""
        return self._state().weights / self.rates.host


def verify_seconds(work: Workload) -> float:
    """Of all workers together; most of it passes while others still generate."""
    return (work.rollouts + work.purified_rollouts) / (_GRADES_A_SECOND * _REWARD_WORKERS)
