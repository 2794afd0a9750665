"""What a step has to do: tokens through the model, and what a token costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lens_megatron.model_spec import ModelSpec

Schedule = Literal["after_group", "early", "speculative"]
LENGTH_SPREAD = 0.7  # sigma of log-normal response lengths, as in benchmarks/_simulated_engine.py


@dataclass(frozen=True)
class Workload:
    """One training step. What nobody knows before the run (mean lengths, how many prompts are rescued) is an assumption."""

    prompts: int = 128
    n: int = 8
    prompt_tokens: float = 160.0  # mean; assumed
    response_tokens: float = 1024.0  # mean; assumed
    longest_prompt: int = 512
    longest_response: int = 4096
    rescued: float = 0.0  # share of prompts that are rolled out again
    schedule: Schedule = "speculative"
    scores_prompts: bool = False  # interference scores by policy and reference
    scores_responses: bool = True  # the reference, for a KL term
    scores_old: bool = True  # pi_old by the trainer; else as sampled
    scores_entropies: bool = False  # one more pass, for a split by entropy
    batches: float = 1.0  # of prompts rolled out for one that trains (filters)
    minibatches: int = 1
    epochs: int = 1
    tokens_per_microbatch: int = 16384
    staleness: int = 0  # 1: the next batch is generated while this one trains

    @property
    def rollouts(self) -> float:
        return self.prompts * self.n * self.batches

    @property
    def purified_rollouts(self) -> float:
        return self.rollouts * self.rescued

    @property
    def trained_tokens(self) -> float:
        """Groups keep their size: purified successes replace failures."""
        return self.prompts * self.n * (self.prompt_tokens + self.response_tokens)

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response


def share_longer(tokens: float, mean: float, longest: int) -> float:
    """Of log-normal responses, cut at `longest`: how many are still being written after `tokens`."""
    if tokens >= longest:
        return 0.0
    if tokens <= 0:
        return 1.0
    middle = math.log(_uncut_mean(mean, longest)) - LENGTH_SPREAD**2 / 2
    return 0.5 * math.erfc((math.log(tokens) - middle) / (LENGTH_SPREAD * math.sqrt(2)))


@lru_cache(maxsize=256)
def _uncut_mean(mean: float, longest: int) -> float:
    """The mean of the log-normal whose cut form has this mean: what is cut off must be put back."""
    if mean >= 0.98 * longest:
        return longest * 100.0

    def cut_mean(uncut: float) -> float:
        middle = math.log(uncut) - LENGTH_SPREAD**2 / 2
        below = 0.5 * math.erfc(-(math.log(longest) - middle - LENGTH_SPREAD**2) / (LENGTH_SPREAD * math.sqrt(2)))
        above = 0.5 * math.erfc((math.log(longest) - middle) / (LENGTH_SPREAD * math.sqrt(2)))
        return uncut * below + longest * above

    low, high = mean, longest * 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cut_mean(middle) < mean else (low, middle)
    return low


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token; a product of weights counts 2 a parameter."""

    layers: float  # matrix products of all layers
    mlp: float  # of these, the MLP's or the chosen experts'
    head: float
    attention: float  # for each token of context

    def forward(self, context: float) -> float:
        return self.layers + self.head + self.attention * context


def token_flops(spec: ModelSpec) -> TokenFlops:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = spec.hidden_size * (2 * q + 2 * kv)
    if spec.moe is None:
        mlp = 3 * spec.hidden_size * spec.ffn_size
    else:
        chosen = spec.moe.experts_per_token
        mlp = 3 * spec.hidden_size * spec.moe.expert_ffn_size * chosen + spec.hidden_size * spec.moe.experts
    return TokenFlops(
        layers=2.0 * spec.layers * (projections + mlp),
        mlp=2.0 * spec.layers * mlp,
        head=2.0 * spec.hidden_size * spec.vocab_size,
        attention=4.0 * q * spec.layers,  # q.k and p.v
    )


def training_flops(spec: ModelSpec, tokens: float, mean_length: float) -> float:
    """Forward and backward, nothing computed again: what a utilisation (MFU) counts. Causal: half the context on average."""
    return 3.0 * tokens * token_flops(spec).forward(mean_length / 2)


def kv_bytes_a_token(spec: ModelSpec, tp: int, element: int = 2) -> float:
    return 2 * spec.layers * max(1.0, spec.kv_heads / tp) * spec.head_dim * element


def workload_of_run(config: Any, **assumed: Any) -> Workload:
    """Of a RunConfig; `assumed` overrides what only the run itself will show."""
    algorithm, rollout, update = config.algorithm, config.rollout, config.update
    rescues = algorithm.rescue.mode != "none"
    longest = rollout.max_response_tokens
    values: dict[str, Any] = {
        "prompts": config.data.prompts_per_step,
        "n": rollout.n,
        "prompt_tokens": min(Workload.prompt_tokens, config.data.max_prompt_tokens),
        "response_tokens": longest / 4,
        "longest_prompt": config.data.max_prompt_tokens,
        "longest_response": longest,
        "rescued": ASSUMED_RESCUED if rescues else 0.0,
        "schedule": rollout.schedule,
        "scores_prompts": rescues and algorithm.rescue.strategy == "interference",
        "scores_responses": algorithm.loss.any_kl,
        "scores_old": update.old_logprobs == "megatron",
        "scores_entropies": algorithm.loss.entropy_split is not None,
        "batches": algorithm.filter.size_factor if algorithm.filter.mode == "dynamic" else 1.0,
        "minibatches": update.minibatches,
        "epochs": update.epochs,
        "tokens_per_microbatch": update.tokens_per_microbatch,
        "staleness": rollout.staleness,
    }
    return Workload(**{**values, **{name: value for name, value in assumed.items() if value is not None}})


ASSUMED_RESCUED = 0.35  # of prompts; benchmarks/results/lens_overhead_embedded.json measured 35% on the toy task
