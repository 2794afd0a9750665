import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.purification.select import delete, deletion_count, select_top
from lens_megatron.types import Prompt


@pytest.mark.parametrize(
    ("gamma", "eligible", "count"),
    [
        (0.05, 20, 1),
        (0.03, 100, 3),
        (0.07, 100, 7),  # 0.07 * 100 = 7.000000000000001
        (0.01, 1, 1),
        (0.03, 34, 2),
        (0.03, 33, 1),
        (0.05, 0, 0),
        (0.29, 100, 29),
        (0.58, 50, 29),
    ],
)
def test_count_takes_gamma_as_written(gamma: float, eligible: int, count: int) -> None:
    assert deletion_count(gamma, eligible) == count


@given(st.integers(1, 999), st.integers(0, 5000))
def test_count_is_the_exact_ceiling(thousandths: int, eligible: int) -> None:
    assert deletion_count(thousandths / 1000, eligible) == -(-thousandths * eligible // 1000)
    assert deletion_count(thousandths / 1000, eligible) == math.ceil(Fraction(thousandths, 1000) * eligible)


def slow_top(scores: list[float], eligible: list[bool], count: int, floor: float, ties: str) -> list[int]:
    """Picks one token at a time: the highest score left, the leftmost of equals; what the floor covers comes last."""
    chosen: list[int] = []
    candidates = [t for t in range(len(scores)) if eligible[t]]
    if ties == "skip" and len(candidates) > count and all(scores[t] == scores[candidates[0]] for t in candidates):
        return []
    while len(chosen) < count:
        above = [t for t in candidates if t not in chosen and scores[t] > floor]
        below = [t for t in candidates if t not in chosen and scores[t] <= floor]
        if above:
            best = max(scores[t] for t in above)
            chosen.append(next(t for t in above if scores[t] == best))
        elif below and ties == "position":
            chosen.append(below[0])
        else:
            break
    return sorted(chosen)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=14),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.15, 3.0]),
    st.sampled_from(["skip", "position"]),
)
def test_matches_one_at_a_time(tokens: list[tuple[float, bool]], count: int, floor: float, ties: str) -> None:
    scores, eligible = [s for s, _ in tokens], [e for _, e in tokens]
    selection = select_top(torch.tensor(scores, dtype=torch.float64), torch.tensor(eligible), count, floor, ties)
    assert list(selection.positions) == slow_top(scores, eligible, count, floor, ties)
    assert selection.above_floor == sum(e and s > floor for s, e in tokens)


def select(scores: list[float], count: int, floor: float = 0.0, ties: str = "skip") -> tuple[int, ...]:
    scores_T = torch.tensor(scores, dtype=torch.float64)
    return select_top(scores_T, torch.ones(len(scores), dtype=torch.bool), count, floor, ties).positions


def test_highest_scores_go_and_equal_ones_from_the_left() -> None:
    assert select([0.1, 3.0, 0.2, 2.0], 2) == (1, 3)
    assert select([0.1, 3.0, 2.0, 2.0, 2.0], 2) == (1, 2)


def test_step_zero_ties_everything() -> None:
    """pi_theta = pi_ref: every score is 0."""
    scores, everything = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    assert select_top(scores, everything, 2, 0.0, "skip").tied
    assert select([0.0] * 4, 2) == ()
    assert select([0.0] * 4, 2, ties="position") == (0, 1)


def test_a_score_on_the_floor_is_a_tie() -> None:
    assert select([0.5, 0.25], 1, floor=0.5) == ()
    assert select([0.5, 0.25], 1, floor=0.49) == (0,)


def test_fewer_than_k_above_the_floor_means_fewer_than_k_deleted() -> None:
    assert select([0.01, 0.02, 5.0, 0.03], 3, floor=0.1) == (2,)
    # by position, the noise below the floor orders nothing: 0 and 1 go, though 3 scores more
    assert select([0.01, 0.02, 5.0, 0.03], 3, floor=0.1, ties="position") == (0, 1, 2)


def test_a_missing_score_is_refused_where_it_matters() -> None:
    scores = torch.tensor([math.nan, 1.0, math.nan], dtype=torch.float64)
    assert select_top(scores, torch.tensor([False, True, False]), 1, 0.0, "skip").positions == (1,)
    with pytest.raises(ValueError, match="position 2"):
        select_top(scores, torch.tensor([False, True, True]), 1, 0.0, "skip")


def test_infinite_scores_rank_first() -> None:
    assert select([1.0, math.inf, 2.0], 1) == (1,)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.data())
def test_deletion_keeps_the_other_ids_in_order(tokens: list[int], data: st.DataObject) -> None:
    positions = data.draw(st.sets(st.integers(0, len(tokens) - 1)))
    purified = delete(Prompt("p", tuple(tokens), (0, len(tokens)), ""), positions)
    rest = list(tokens)
    for position in sorted(positions, reverse=True):
        del rest[position]
    assert purified.tokens == tuple(rest)
    assert purified.deleted == tuple(sorted(positions))
    assert purified.prompt_id == "p"


def test_deleting_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no such positions"):
        delete(Prompt("p", (1, 2), (0, 2), ""), [2])
