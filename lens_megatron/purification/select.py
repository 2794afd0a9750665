"""How many tokens go, which ones, and the prompt without them.

Shapes: T tokens of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from jaxtyping import Bool, Float
from torch import Tensor

from lens_megatron.purification.config import Ties
from lens_megatron.types import Prompt, PurifiedPrompt


def deletion_count(gamma: float, eligible: int) -> int:
    """k = ceil(gamma n), with gamma as it is written: 0.07 of 100 is 7, though 0.07 * 100 is 7.000000000000001."""
    return math.ceil(Fraction(repr(gamma)) * eligible)


@dataclass(frozen=True)
class Selection:
    """Positions to delete, ascending. `tied`: nothing told the eligible tokens apart."""

    positions: tuple[int, ...]
    tied: bool
    above_floor: int


def select_top(
    scores_T: Float[Tensor, " T"], eligible_T: Bool[Tensor, " T"], count: int, floor: float, ties: Ties
) -> Selection:
    """The `count` eligible tokens of highest score, equal scores from the left.

    A score at or below the floor is a tie: it orders nothing. Tied tokens are chosen only with `ties: position`, after
    all others and from the left, whatever their scores. A prompt is tied as a whole when no eligible token is above
    the floor, or when all have one score and a choice would be arbitrary.
    """
    scores = scores_T.tolist()
    eligible = [position for position, may_go in enumerate(eligible_T.tolist()) if may_go]
    unscored = [position for position in eligible if scores[position] != scores[position]]
    if unscored:
        raise ValueError(f"no score at eligible position {unscored[0]}: its log-prob is missing or not a number")
    above = [position for position in eligible if scores[position] > floor]
    indistinct = len(eligible) > count and len({scores[position] for position in eligible}) == 1
    tied = bool(eligible) and (not above or indistinct)
    if tied and ties == "skip":
        return Selection((), True, len(above))
    ranked = sorted(above, key=lambda position: (-scores[position], position))
    if ties == "position":
        ranked += sorted(set(eligible) - set(above))
    return Selection(tuple(sorted(ranked[:count])), tied, len(above))


def delete(prompt: Prompt, positions: Iterable[int]) -> PurifiedPrompt:
    """x' = x without the tokens at these positions. On ids: decoding and encoding again could merge what is left."""
    deleted = tuple(sorted(set(positions)))
    if deleted and not 0 <= deleted[0] <= deleted[-1] < len(prompt.tokens):
        raise ValueError(f"prompt {prompt.id!r}: no such positions among {len(prompt.tokens)} tokens: {deleted}")
    gone = set(deleted)
    kept = tuple(token for position, token in enumerate(prompt.tokens) if position not in gone)
    return PurifiedPrompt(prompt.id, kept, deleted)
