"""What a run may choose about purification. The paper's choices are the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Strategy = Literal["interference", "random", "gradient", "resample", "planted"]
Scope = Literal["question", "prompt"]
Ties = Literal["skip", "position"]


@dataclass(frozen=True)
class PurificationConfig:
    """Sections 2.1 and 4.3 of the paper; `strategy` holds the rivals of its Table 6.

    strategy     interference: highest |log pi_theta - log pi_ref| (Eq. 1).  random: uniform over the same tokens.
                 gradient: smallest gradient norm of the token's embedding.  resample: delete nothing, roll out again.
                 planted: an oracle, for data whose rows say where noise was planted: all of it, whatever gamma says.
    gamma        deletion ratio: k = ceil(gamma x number of eligible tokens). The paper sweeps 1% to 5%.
    scope        question: tokens of the user's question.  prompt: every non-special token but the first.
    ties         what happens to tokens whose score is not above the noise floor. skip: never chosen, and a prompt
                 where nothing is above it is not purified.  position: chosen last, leftmost first (the literal top k).
    noise_floor  "measured": from two evaluations of equal weights in different packings.  A number: that floor;
                 0 with `ties: position` is the paper to the letter.
    noise_quantile  which quantile of the measured spread is the floor; 1 is the maximum (see noise_floor.py).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    strategy: Strategy = "interference"
    gamma: float = 0.03
    scope: Scope = "question"
    ties: Ties = "skip"
    noise_floor: float | Literal["measured"] = "measured"
    noise_quantile: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma is a share of the prompt's tokens, between 0 and 1: got {self.gamma}")
        if self.noise_floor != "measured" and not 0 <= self.noise_floor < float("inf"):
            raise ValueError(f"noise_floor is 'measured' or a number from 0 up: got {self.noise_floor}")
        if not 0 < self.noise_quantile <= 1:
            raise ValueError(f"noise_quantile is above 0 and at most 1: got {self.noise_quantile}")
