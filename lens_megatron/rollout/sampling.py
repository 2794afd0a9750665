"""What the sampler is asked for, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lens_megatron.types import Group

Schedule = Literal["after_group", "early", "speculative"]


@dataclass(frozen=True)
class SamplingConfig:
    """n                    rollouts a prompt, of x and again of x'.
    speculate_from       speculation needs at least this chance that the rescue will be wanted (0..1).
    stall_seconds        no token and no reward for so long ends the run with a message.
    routing_replay       the trainer sends the tokens of rollouts to the experts that the engine's routers took.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    n: int = 8
    max_response_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    schedule: Schedule = "speculative"
    speculate_from: float = 0.1
    stall_seconds: float = 600.0
    routing_replay: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_response_tokens < 1:
            raise ValueError("n and max_response_tokens are at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature is at least 0, and top_p above 0 and at most 1")
        if not 0 <= self.speculate_from <= 1:
            raise ValueError(f"speculate_from is a chance between 0 and 1: got {self.speculate_from}")
        if self.stall_seconds <= 0:
            raise ValueError("stall_seconds is above 0")


@dataclass(frozen=True)
class RescueRules:
    """What the rewards of Y finished so far, out of n, make certain. With all n given exactly one of the two holds."""

    certain: Callable[[Sequence[float], int], bool]
    moot: Callable[[Sequence[float], int], bool]


def _never(rewards: Sequence[float], n: int) -> bool:
    return False


def _always(rewards: Sequence[float], n: int) -> bool:
    return True


NO_RESCUE = RescueRules(certain=_never, moot=_always)


@dataclass
class SampleCounts:
    """What the batch took. Purified rollouts that train nothing are `wasted`; those that were complete when their
    group's last original was scored are `saved`: after_group would have begun them only then."""

    original_rollouts: int = 0
    original_tokens: int = 0
    purified_rollouts: int = 0
    purified_tokens: int = 0
    speculated_rollouts: int = 0  # started before their rescue was certain
    speculated_tokens: int = 0
    wasted_rollouts: int = 0
    wasted_tokens: int = 0
    saved_rollouts: int = 0
    saved_tokens: int = 0
    resubmitted_rollouts: int = 0
    seconds: float = 0.0
    originals_seconds: float = 0.0  # until the last original was scored
    reward_seconds: float = 0.0  # of `seconds`, waited for rewards while nothing was generated; by the wall clock


@dataclass(frozen=True)
class SampleResult:
    groups: list[Group]
    counts: SampleCounts
