"""GRESO's memory (arXiv 2506.02177): prompts whose last rollouts all succeeded, or all failed, are probably skipped.

z is the length of a prompt's trailing streak of easy or of hard groups. It is skipped with probability
1 - max(p^z, explore), p being p_easy or p_hard, each moved so that the share of zero-variance groups among those
rolled out approaches its target. Streaks count original rollouts: a rescue changes what trains, not how hard x is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from lens_megatron.algorithms.outcomes import zero_variance

Difficulty = Literal["easy", "hard"]


@dataclass(frozen=True)
class GresoConfig:
    """Published defaults; where the public code does otherwise than its paper, the paper's meaning.

    p_easy, p_hard      where the two start; from the second epoch on each moves by p_step within [p_min, p_max].
    explore             a prompt is tried again with at least this probability, however long its streak.
    easy_at, hard_at    a group of equal rewards is easy from easy_at on, hard up to hard_at (0.11: a reward of 0.1 for format
                        alone is hard too). The public code looks at the mean alone, which skips prompts that teach
                        where one success of n is 0.11 or less: from n = 10 on.
    target              aimed-at share of easy and hard groups; a third of it easy, two thirds hard.
    hard_ratio          hard_groups: what p_hard answers to is the share of hard groups.  format_only: as in the
                        public code, only groups of mean exactly 0.1, so that with 0/1 rewards p_hard climbs to p_max
                        and the hard filter turns itself off.
    oversample          batch = missing / (share of the last batch that was kept) x oversample,
    min_batch, max_batch  clamped to these multiples of the prompts per step (64 and 384 for the published 256).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    p_easy: float = 0.5
    p_hard: float = 0.5
    p_step: float = 0.01
    p_min: float = 0.05
    p_max: float = 0.95
    explore: float = 0.01
    easy_at: float = 0.98
    hard_at: float = 0.11
    target: float = 0.25
    hard_ratio: Literal["hard_groups", "format_only"] = "hard_groups"
    oversample: float = 1.25
    min_batch: float = 0.25
    max_batch: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.p_min <= min(self.p_easy, self.p_hard) <= max(self.p_easy, self.p_hard) <= self.p_max <= 1:
            raise ValueError("greso needs 0 < p_min <= p_easy, p_hard <= p_max <= 1")
        if not 0 < self.explore <= 1:
            raise ValueError(f"greso.explore is above 0 (no prompt is lost for good) and at most 1: got {self.explore}")
        if not self.hard_at < self.easy_at:
            raise ValueError("greso.hard_at must be below greso.easy_at")
        if self.p_step < 0 or not 0 <= self.target <= 1:
            raise ValueError("greso.p_step cannot be negative, and greso.target is a share between 0 and 1")
        if self.oversample < 1 or not 0 < self.min_batch <= self.max_batch:
            raise ValueError("greso needs oversample >= 1 and 0 < min_batch <= max_batch")


class GresoHistory:
    """Streaks and the two p. All of it goes into the checkpoint."""

    def __init__(self, config: GresoConfig) -> None:
        self.config = config
        self.p_easy = config.p_easy
        self.p_hard = config.p_hard
        self._streaks: dict[str, int] = {}  # +z easy, -z hard, 0 neither

    def skip_probability(self, prompt_id: str) -> float:
        """0 for a prompt never rolled out, and for one whose last group had both successes and failures."""
        streak = self._streaks.get(prompt_id, 0)
        p = self.p_easy if streak > 0 else self.p_hard
        return 1 - max(p ** abs(streak), self.config.explore) if streak else 0.0

    def difficulty(self, prompt_id: str) -> Difficulty | None:
        streak = self._streaks.get(prompt_id, 0)
        return "easy" if streak > 0 else "hard" if streak < 0 else None

    def observe(self, prompt_id: str, rewards: Sequence[float]) -> None:
        """Another group of original rollouts of this prompt."""
        streak = self._streaks.get(prompt_id, 0)
        kind = self._kind(rewards)
        self._streaks[prompt_id] = max(streak, 0) + 1 if kind == "easy" else min(streak, 0) - 1 if kind == "hard" else 0

    def ratios(self, groups: Sequence[Sequence[float]]) -> dict[Difficulty, float]:
        """Shares of easy and hard groups among those rolled out in a step, each given by its rewards."""
        kinds = [self._kind(rewards) for rewards in groups]
        hard = kinds.count("hard")
        if self.config.hard_ratio == "format_only":
            hard = sum(math.isclose(_mean(rewards), 0.1, abs_tol=1e-6) for rewards in groups)
        return {"easy": kinds.count("easy") / max(1, len(kinds)), "hard": hard / max(1, len(kinds))}

    def _kind(self, rewards: Sequence[float]) -> Difficulty | None:
        if not zero_variance(rewards):
            return None
        mean = _mean(rewards)
        return "easy" if mean >= self.config.easy_at else "hard" if mean <= self.config.hard_at else None

    def adapt(self, ratios: dict[Difficulty, float]) -> None:
        """Too many zero-variance groups of a kind: a smaller p skips more of them."""
        self.p_easy = self._moved(self.p_easy, ratios["easy"] >= self.config.target / 3)
        self.p_hard = self._moved(self.p_hard, ratios["hard"] >= self.config.target * 2 / 3)

    def _moved(self, p: float, too_many: bool) -> float:
        # rounded: 0.5 - 0.01 forty-five times is not 0.05 in floating point
        moved = round(p - self.config.p_step if too_many else p + self.config.p_step, 12)
        return min(max(moved, self.config.p_min), self.config.p_max)

    def state_dict(self) -> dict[str, Any]:
        return {"p_easy": self.p_easy, "p_hard": self.p_hard, "streaks": dict(self._streaks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p_easy, self.p_hard = float(state["p_easy"]), float(state["p_hard"])
        self._streaks = {str(prompt_id): int(streak) for prompt_id, streak in state["streaks"].items()}


def _mean(rewards: Sequence[float]) -> float:
    return sum(rewards) / len(rewards)


def largest_batch(prompts_per_step: int, config: GresoConfig) -> int:
    """Also the first batch of a step, when nothing is known yet."""
    return math.ceil(Fraction(repr(config.max_batch)) * prompts_per_step)


def adaptive_batch(
    missing: int, kept: int, judged: int, prompts_per_step: int, config: GresoConfig
) -> tuple[int, bool]:
    """Prompts to roll out next, and whether this is the step's last batch.

    `kept` of `judged` groups of the last batch had a signal; judged / kept is the published
    1 / (1 - zero_variance_ratio). With none kept that is a division by zero: then the largest batch, and not the last.
    The last batch is one whose estimate fits into the largest batch: the step trains with what it brings.
    """
    largest = largest_batch(prompts_per_step, config)
    if kept == 0:
        return largest, False
    estimate = math.floor(Fraction(missing * judged, kept) * Fraction(repr(config.oversample)))
    smallest = math.ceil(Fraction(repr(config.min_batch)) * prompts_per_step)
    return min(max(estimate, smallest), largest), estimate <= largest
