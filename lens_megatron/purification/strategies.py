"""One question, five answers: under which tokens is a failing prompt rolled out again?

Interference is the paper's; random, gradient and resample are the rivals of its Table 6. All take the same prompt,
the same eligible tokens and the same k. Planted is the bound that none can pass, where noise was planted on purpose.

Shapes: T tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from lens_megatron.purification.config import PurificationConfig, Strategy
from lens_megatron.purification.eligibility import eligible_tokens
from lens_megatron.purification.seeds import choose, seed_for
from lens_megatron.purification.select import Selection, delete, deletion_count, select_top
from lens_megatron.types import Prompt, PurifiedPrompt

OutcomeKind = Literal["purified", "resample", "tied", "nothing_eligible", "nothing_planted"]


@dataclass(frozen=True)
class Signals:
    """What was measured on a prompt. Only the strategy in use needs its own."""

    scores_T: Float[Tensor, " T"] | None = None  # Eq. 1
    gradient_norms_T: Float[Tensor, " T"] | None = None  # of the embedding of each prompt token
    measured_floor: float | None = None  # of this model and layout


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt; prompts without `roll_tokens` cannot be rescued, and metrics count why."""

    prompt_id: str
    kind: OutcomeKind
    purified_prompt: PurifiedPrompt | None = None
    roll_tokens: tuple[int, ...] | None = None  # x', or x itself when resampling
    eligible: int = 0
    above_floor: int | None = None  # how many eligible scores the noise does not explain; interference only
    tied: bool = False  # nothing told the tokens apart; with `ties: position` it was purified all the same

    @property
    def rescue_prompt(self) -> PurifiedPrompt | None:
        """What the sampler rolls out: x', or when resampling x as a purified prompt without a deletion."""
        if self.roll_tokens is None:
            return None
        return self.purified_prompt or PurifiedPrompt(self.prompt_id, self.roll_tokens, ())


@dataclass(frozen=True)
class _Request:
    prompt: Prompt
    config: PurificationConfig
    eligible_T: Bool[Tensor, " T"]
    count: int
    signals: Signals
    seed: int


def purify(
    prompt: Prompt, config: PurificationConfig, special_ids: Collection[int], signals: Signals, seed: int, step: int
) -> Outcome:
    """The prompt's rescue. The same arguments give the same answer in every process."""
    if config.strategy == "resample":
        return Outcome(prompt.id, "resample", roll_tokens=prompt.tokens)
    eligible_T = eligible_tokens(prompt, special_ids, config.scope)
    eligible = int(eligible_T.sum())
    if eligible == 0:
        return Outcome(prompt.id, "nothing_eligible")
    request = _Request(
        prompt,
        config,
        eligible_T,
        deletion_count(config.gamma, eligible),
        signals,
        seed_for(seed, step, prompt.id, "delete"),
    )
    selection = _STRATEGIES[config.strategy](request)
    above_floor = selection.above_floor if config.strategy == "interference" else None
    if not selection.positions and not selection.tied:
        return Outcome(prompt.id, "nothing_planted", eligible=eligible)
    if not selection.positions:
        return Outcome(prompt.id, "tied", eligible=eligible, above_floor=above_floor, tied=True)
    purified = delete(prompt, selection.positions)
    return Outcome(prompt.id, "purified", purified, purified.tokens, eligible, above_floor, selection.tied)


def _interference(request: _Request) -> Selection:
    scores_T = _measured(request, request.signals.scores_T, "interference scores")
    floor = request.config.noise_floor
    if floor == "measured":
        if request.signals.measured_floor is None:
            raise ValueError("noise_floor is 'measured', but no floor was measured for this model and layout")
        floor = request.signals.measured_floor
    return select_top(scores_T, request.eligible_T, request.count, floor, request.config.ties)


def _gradient(request: _Request) -> Selection:
    """Smallest norms go. The noise floor is one of log-probs and says nothing about norms.

    The prompt's last token stays, where a template lets the question end with it: nothing is predicted from it, and its
    norm is 0 whatever it means.
    """
    norms_T = _measured(request, request.signals.gradient_norms_T, "gradient norms")
    may_go_T = request.eligible_T.clone()
    may_go_T[-1] = False
    if not may_go_T.any():
        return Selection((), tied=True, above_floor=0)
    return select_top(-norms_T, may_go_T, request.count, float("-inf"), request.config.ties)


def _random(request: _Request) -> Selection:
    positions = [position for position, may_go in enumerate(request.eligible_T.tolist()) if may_go]
    return Selection(choose(positions, request.count, request.seed), tied=False, above_floor=0)


def _planted(request: _Request) -> Selection:
    """Eligible ones only: a template is nobody's noise."""
    may_go = request.eligible_T.tolist()
    return Selection(tuple(t for t in request.prompt.planted if may_go[t]), tied=False, above_floor=0)


def _measured(request: _Request, values_T: Float[Tensor, " T"] | None, what: str) -> Float[Tensor, " T"]:
    if values_T is None:
        raise ValueError(f"prompt {request.prompt.id!r}: strategy {request.config.strategy!r} needs its {what}")
    if len(values_T) != len(request.prompt.tokens):
        raise ValueError(
            f"prompt {request.prompt.id!r}: {len(values_T)} {what} for {len(request.prompt.tokens)} tokens"
        )
    return values_T


_STRATEGIES: dict[Strategy, Callable[[_Request], Selection]] = {
    "interference": _interference,
    "gradient": _gradient,
    "random": _random,
    "planted": _planted,
}
