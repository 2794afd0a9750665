"""The losses once more, slowly: Python floats, one sample and one token at a time, straight from the papers' formulas.

`current` holds log pi_theta and `anchor` the same numbers for every place under a stop-gradient, so that moving
`current` alone and taking differences gives the gradient the papers mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lens_megatron.algorithms.loss_config import LossConfig


@dataclass
class SlowSample:
    group: int
    advantage: float
    weight: float
    purified: bool
    proximal: list[float]  # under x_roll
    behaviour: list[float]
    reference: list[float]
    under_x: list[float]  # pi_old
    under_x_prime: list[float]  # pi_old; under x where there is no x'
    entropy: list[float]
    high: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.proximal)


def slow_loss(
    batch: list[SlowSample], config: LossConfig, current: list[list[float]], anchor: list[list[float]]
) -> float:
    groups = len({sample.group for sample in batch})
    split = config.entropy_split

    def trains(sample: SlowSample, t: int) -> bool:
        if split is None or split.train_on == "all":
            return True
        return sample.high[t] if split.train_on == "high" else not sample.high[t]

    full = split is not None and split.denominator == "full"
    selected = sum(full or trains(s, t) for s in batch for t in range(len(s)))
    policy = 0.0
    for sample, now, frozen in zip(batch, current, anchor, strict=True):
        own = len(sample) if full else sum(trains(sample, t) for t in range(len(sample)))
        for t in range(len(sample)):
            if not trains(sample, t):
                continue
            term = sample.weight * off_policy_weight(sample, t, config) * surrogate(sample, t, config, now, frozen)
            if config.aggregation == "token_mean":
                policy -= term / selected
            elif config.aggregation == "sequence_mean":
                policy -= term / own / len(batch)
            elif config.ratio == "token":
                policy -= term / groups
            else:  # one term a sequence
                policy -= term / own / groups
    return policy + slow_kl(batch, config, current) - slow_bonus(batch, config) - slow_imitation(batch, config, current)


def log_ratio(sample: SlowSample, t: int, config: LossConfig, logprobs: list[float]) -> float:
    kind = config.purified_ratio.split("(")[0]
    old = sample.under_x if kind == "mixture" or (kind == "none" and sample.purified) else sample.proximal
    differences = [a - b for a, b in zip(logprobs, old, strict=True)]
    if config.ratio == "length_normalised" or (kind == "gspo" and sample.purified):
        return sum(differences) / len(differences)
    return differences[t] if config.ratio == "token" else sum(differences)


def surrogate(sample: SlowSample, t: int, config: LossConfig, now: list[float], frozen: list[float]) -> float:
    a, logprob = sample.advantage, now[t]
    rho, frozen_rho = (math.exp(log_ratio(sample, t, config, values)) for values in (now, frozen))
    kind, _, argument = config.purified_ratio.rstrip(")").partition("(")
    if sample.purified and kind == "floor":
        return min(max(frozen_rho, float(argument)), 1.0) * a * logprob
    if sample.purified and kind == "power":
        return frozen_rho ** float(argument) * a * logprob
    if sample.purified and kind == "luffy":
        p = math.exp(logprob)
        return a * p / (p + float(argument or 0.1))
    low, high = config.clip_low, config.clip_high
    split = config.entropy_split
    if split and sample.high[t]:
        low = low if split.high_clip_low is None else split.high_clip_low
        high = high if split.high_clip_high is None else split.high_clip_high
    if config.surrogate == "cispo":
        return min(max(frozen_rho, 1 - low), 1 + high) * a * logprob
    if config.surrogate == "aspo" and a > 0:
        return 0.0 if frozen_rho > 1 + high else min(1 / frozen_rho, config.dual_clip or math.inf) * a * logprob
    if a > 0:
        return min(rho, 1 + high) * a
    return min(max(rho, 1 - low), config.dual_clip or math.inf) * a


def off_policy_weight(sample: SlowSample, t: int, config: LossConfig) -> float:
    weight = 1.0
    correction = config.engine_correction
    if correction.mode != "none":
        logs = [a - b for a, b in zip(sample.proximal, sample.behaviour, strict=True)]
        mean = math.exp(sum(logs) / len(logs))
        measured = mean if correction.mode == "mask_sequences" else math.exp(logs[t])
        weight = min(math.exp(logs[t]), correction.cap)
        if correction.mode != "truncate" and not correction.floor <= measured <= correction.cap:
            weight = 0.0
    if config.purified_ratio == "mixture(token)":
        x, x_prime = math.exp(sample.under_x[t]), math.exp(sample.under_x_prime[t])
        weight *= x / (0.5 * x + 0.5 * x_prime)
    if config.purified_ratio == "mixture(sequence)":
        x, x_prime = math.exp(sum(sample.under_x)), math.exp(sum(sample.under_x_prime))
        weight *= x / (0.5 * x + 0.5 * x_prime)
    return weight


def slow_kl(batch: list[SlowSample], config: LossConfig, current: list[list[float]]) -> float:
    def kl(sample: SlowSample, now: list[float], t: int) -> float:
        log = now[t] - sample.reference[t]
        return {"k1": log, "k2": log * log / 2, "k3": math.exp(-log) - 1 + log}[config.kl]

    inside = [(s, now) for s, now in zip(batch, current, strict=True) if config.kl_scope == "all" or not s.purified]
    tokens = [(s, now, t) for s, now in inside for t in range(len(s))]
    split = config.entropy_split
    if split and split.high_kl_coef is not None:
        total = 0.0
        for is_high, coef in ((True, split.high_kl_coef), (False, config.kl_coef)):
            own = [kl(s, now, t) for s, now, t in tokens if s.high[t] == is_high]
            total += coef * sum(own) / max(len(own), 1)
        return total
    if config.aggregation == "token_mean":
        return config.kl_coef * sum(kl(*token[:2], token[2]) for token in tokens) / len(tokens)
    sequences = [sum(kl(s, now, t) for t in range(len(s))) for s, now in inside]
    if config.aggregation == "sequence_mean":
        sequences = [value / len(s) for value, (s, _) in zip(sequences, inside, strict=True)]
    return config.kl_coef * sum(sequences) / len(sequences)


def slow_bonus(batch: list[SlowSample], config: LossConfig) -> float:
    if config.aggregation == "token_mean":
        every = [value for sample in batch for value in sample.entropy]
        return config.entropy_coef * sum(every) / len(every)
    means = [sum(sample.entropy) / len(sample) for sample in batch]
    return config.entropy_coef * sum(means) / len(means)


def slow_imitation(batch: list[SlowSample], config: LossConfig, current: list[list[float]]) -> float:
    every = [value for sample, now in zip(batch, current, strict=True) if sample.purified for value in now]
    return config.imitation_coef * sum(every) / max(len(every), 1)


def slow_high_masks(entropies: list[list[float]], scope: str, share: float) -> list[list[bool]]:
    """By sorting: the top ceil(share N) of all, or those above the response's interpolated quantile."""
    if scope == "batch":
        places = sorted((-value, s, t) for s, values in enumerate(entropies) for t, value in enumerate(values))
        chosen = {(s, t) for _, s, t in places[: math.ceil(share * len(places) - 1e-9)]}
        return [[(s, t) in chosen for t in range(len(values))] for s, values in enumerate(entropies)]
    masks = []
    for values in entropies:
        ordered, place = sorted(values), (1 - share) * (len(values) - 1)
        below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
        masks.append([value > below + (above - below) * (place - math.floor(place)) for value in values])
    return masks
