"""What a judge says of one response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# correct: reward 1.  partial: some of several answers, or a graded reward.  wrong: an answer, but not this one.
# unparsable: no answer that could be read within the limits; `note` says why.
Verdict = Literal["correct", "partial", "wrong", "unparsable"]
Note = Literal["", "no answer", "not understood", "too long", "control characters", "timeout", "memory", "crashed"]


@dataclass(frozen=True)
class Judgement:
    reward: float  # 0 to 1
    verdict: Verdict
    note: Note = ""
    extracted: str = ""  # the answer that was read from the response, shortened, for people
    answer_reward: float | None = None  # where a format rule made the reward another: the answer's own


_ROUNDING = 1e-6  # a graded reward's parts, 0.7 + 0.2 + 0.1, add up to a little less than 1


def verdict_of(reward: float) -> Verdict:
    return "correct" if reward >= 1 - _ROUNDING else "wrong" if reward <= 0 else "partial"
