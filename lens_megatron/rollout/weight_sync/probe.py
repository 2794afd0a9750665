"""The last proof that a server has the weights: what it says of a few tokens, against what the trainer says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_LARGEST = {"fp32": 1e-4, "bf16": 0.5}
# Near a tie a router of a mixture takes another expert, and in bf16 there always is one: single tokens differ by nats then
# (1.4 seen in a tiny model), while a tensor that is wrong moves them all.
_MEAN_OF_MIXTURES = 0.25


@dataclass(frozen=True)
class Bound:
    """On |engine - trainer| of the probe's tokens: on the largest, or on their mean."""

    kind: Literal["largest", "mean"]
    most: float

    def says(self) -> str:
        return f"{self.kind} difference at most {self.most:g}"


def bound_for(tolerance: float | None, fp32: bool, mixture: bool) -> Bound:
    """`tolerance`: rollout.sync.probe_tolerance, of the largest difference."""
    if tolerance is None and mixture and not fp32:
        return Bound("mean", _MEAN_OF_MIXTURES)
    return Bound("largest", tolerance or _LARGEST["fp32" if fp32 else "bf16"])


@dataclass(frozen=True)
class Probe:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # the trainer's, of all tokens but the first
    bound: Bound

    def differences(self, answer: Sequence[float]) -> tuple[float, float]:
        """The largest and the mean; infinite where a number is none."""
        apart = [abs(a - b) for a, b in zip(answer, self.logprobs, strict=True)]
        if not all(map(math.isfinite, apart)):
            return math.inf, math.inf
        return max(apart), sum(apart) / len(apart)

    def complaint(self, answer: Sequence[float]) -> str | None:
        """What is wrong with a server that answers this."""
        largest, mean = self.differences(answer)
        if (mean if self.bound.kind == "mean" else largest) <= self.bound.most:
            return None
        return (
            f"log-probs of the probe differ from the trainer's by up to {largest:.3g}, {mean:.3g} on average "
            f"({self.bound.says()}: rollout.sync.probe_tolerance)"
        )
