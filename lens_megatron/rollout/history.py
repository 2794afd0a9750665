"""How often each prompt succeeded so far, and the chance that its next group will want a rescue.

It orders and admits speculation; it never decides whether a group is rescued.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, lgamma
from typing import Any

DECAY = 0.5  # weight of an earlier visit against the next one: the policy moves
PRIOR_STRENGTH = 2.0  # rollouts that the mean over all prompts counts for


class SuccessHistory:
    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # prompt id -> decayed (successes, rollouts)
        self._all = (0.0, 0.0)

    def record(self, groups: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Rewards of the originals of one step's groups."""
        successes, rollouts = 0.0, 0.0
        for prompt_id, rewards in groups:
            total = sum(_clip(reward) for reward in rewards)
            old = self._seen.get(prompt_id, (0.0, 0.0))
            self._seen[prompt_id] = (DECAY * old[0] + total, DECAY * old[1] + len(rewards))
            successes, rollouts = successes + total, rollouts + len(rewards)
        self._all = (DECAY * self._all[0] + successes, DECAY * self._all[1] + rollouts)

    def belief(self, prompt_id: str, rewards: Sequence[float]) -> tuple[float, float]:
        """Beta parameters of the prompt's success rate, from all prompts, its own past and its group's rewards."""
        mean = (self._all[0] + 1.0) / (self._all[1] + 2.0)
        successes, rollouts = self._seen.get(prompt_id, (0.0, 0.0))
        successes += sum(_clip(reward) for reward in rewards)
        rollouts += len(rewards)
        return PRIOR_STRENGTH * mean + successes, PRIOR_STRENGTH * (1 - mean) + rollouts - successes

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {key: list(value) for key, value in self._seen.items()}, "all": list(self._all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = {key: (float(s), float(n)) for key, (s, n) in state["seen"].items()}
        self._all = (float(state["all"][0]), float(state["all"][1]))


def chance_below(needed: int, trials: int, alpha: float, beta: float) -> float:
    """P(fewer than `needed` of `trials` succeed), the rate drawn from Beta(alpha, beta)."""
    if needed > trials:
        return 1.0
    return min(1.0, sum(_beta_binomial(k, trials, alpha, beta) for k in range(needed)))


def _beta_binomial(k: int, n: int, alpha: float, beta: float) -> float:
    def log_beta(a: float, b: float) -> float:
        return lgamma(a) + lgamma(b) - lgamma(a + b)

    ways = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
    return exp(ways + log_beta(k + alpha, n - k + beta) - log_beta(alpha, beta))


def _clip(reward: float) -> float:
    return min(1.0, max(0.0, reward))
