"""The last proof that a server has the weights: what it says of a few tokens, against what the trainer says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """On |engine - trainer| of the probe's tokens; None: no bound."""

    largest: float
    mean: float | None = None

    def says(self) -> str:
        return f"at most {self.largest:g}" + ("" if self.mean is None else f", {self.mean:g} on average")


# Near a tie a router of a mixture takes another expert, and in bf16 there always is one: single tokens differ by nats then (2.2
# seen in a tiny model, 0.04 on average). What a bucket of random experts does to the few tokens that go there is more.
_DENSE, _MIXTURE, _FP32 = Bound(0.5), Bound(3.0, 0.15), Bound(1e-4)


def bound_for(tolerance: float | None, fp32: bool, mixture: bool) -> Bound:
    """`tolerance`: rollout.sync.probe_tolerance, of the largest difference."""
    if tolerance is not None:
        return Bound(tolerance)
    return _FP32 if fp32 else _MIXTURE if mixture else _DENSE


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
        if largest <= self.bound.largest and (self.bound.mean is None or mean <= self.bound.mean):
            return None
        return (
            f"log-probs of the probe differ from the trainer's by up to {largest:.3g}, {mean:.3g} on average "
            f"({self.bound.says()}: rollout.sync.probe_tolerance)"
        )
