"""Plans of packs: nothing lost, nothing over budget, every rank equally busy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lens_megatron.errors import UsageError
from lens_megatron.mcore import packing
from lens_megatron.mcore.packing import Pack, local_positions, plan_packs

LENGTHS = st.lists(st.integers(1, 300), max_size=40)
LAYOUTS = st.fixed_dictionaries(
    {
        "dp": st.integers(1, 5),
        "cp": st.sampled_from([1, 2, 3, 4]),
        "tp": st.sampled_from([1, 2, 3, 4]),
        "multiple": st.integers(1, 4),
    }
)


def units(cp: int, tp: int) -> tuple[int, int]:
    """What a sequence's and a pack's tokens must divide by: two chunks for every context rank; whole tokens for tp."""
    sequence = 2 * cp if cp > 1 else 1
    return sequence, math.lcm(sequence, cp * tp)


def padded(length: int, unit: int) -> int:
    return math.ceil(length / unit) * unit


def roomy(lengths: list[int], extra: int, layout: dict[str, int]) -> int:
    """A budget that holds the longest sequence."""
    sequence, pack = units(layout["cp"], layout["tp"])
    return padded(max(lengths, default=1), sequence) + pack + extra


@given(lengths=LENGTHS, extra=st.integers(0, 700), layout=LAYOUTS)
@example(lengths=[], extra=0, layout={"dp": 3, "cp": 2, "tp": 2, "multiple": 2})
@example(lengths=[5], extra=0, layout={"dp": 4, "cp": 1, "tp": 1, "multiple": 1})
def test_plan(lengths: list[int], extra: int, layout: dict[str, int]) -> None:
    budget = roomy(lengths, extra, layout)
    plan = plan_packs(lengths, budget, **layout)
    sequence_unit, pack_unit = units(layout["cp"], layout["tp"])
    assert len(plan) == layout["dp"]
    assert len({len(packs) for packs in plan}) == 1, "every rank has as many micro-batches"
    assert len(plan[0]) >= 1
    assert len(plan[0]) % layout["multiple"] == 0
    packs = [pack for rank in plan for pack in rank]
    assert sorted(index for pack in packs for index in pack.sequences) == list(range(len(lengths)))
    for pack in packs:
        assert pack.tokens == sum(pack.padded_lengths) <= budget
        assert pack.tokens % pack_unit == 0
        assert all(length % sequence_unit == 0 for length in pack.padded_lengths)
        assert len(pack.padded_lengths) == max(1, len(pack.sequences))
        if pack.sequences:
            assert pack.sequences == tuple(sorted(pack.sequences))
            least = [padded(lengths[index], sequence_unit) for index in pack.sequences]
            assert list(pack.padded_lengths[:-1]) == least[:-1], (
                "only a pack's last sequence carries the pack's padding"
            )
            assert 0 <= pack.padded_lengths[-1] - least[-1] < pack_unit
        else:
            assert pack.tokens == pack_unit, "pure padding is as small as it can be"
    assert plan == plan_packs(lengths, budget, **layout), "every rank computes the same plan by itself"


@given(lengths=LENGTHS, extra=st.integers(0, 700), layout=LAYOUTS)
def test_no_more_packs_than_needed_twice_over(lengths: list[int], extra: int, layout: dict[str, int]) -> None:
    """Any two neighbouring packs of a first-fit packing exceed the budget: at most twice the least possible number."""
    assume(lengths)
    budget = roomy(lengths, extra, layout)
    sequence_unit, pack_unit = units(layout["cp"], layout["tp"])
    room = budget - pack_unit
    tokens = sum(padded(length, sequence_unit) for length in lengths)
    count = sum(len(packs) for packs in plan_packs(lengths, budget, **layout))
    step = layout["dp"] * layout["multiple"]
    assert count <= math.ceil(max(1, 2 * tokens / max(1, room)) / step) * step + step


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), dp=st.integers(1, 6), extra=st.integers(0, 900))
def test_balanced(lengths: list[int], dp: int, extra: int) -> None:
    """Micro-batches of one plan, and ranks, differ by less than the longest sequence."""
    plan = plan_packs(lengths, max(lengths) + extra, dp=dp)
    loads = [[sum(lengths[index] for index in pack.sequences) for pack in packs] for packs in plan]
    flat = [load for rank in loads for load in rank]
    assert max(flat) - min(flat) <= max(lengths)
    sums = [sum(rank) for rank in loads]
    assert max(sums) - min(sums) <= max(lengths)


def test_the_number_of_packs_is_found_in_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of these share a pack, though by their sum they could: one more pack a try would take 980 tries."""
    tries = 0
    spread = packing._spread

    def counted(lengths: list[int], count: int) -> Any:
        nonlocal tries
        tries += 1
        return spread(lengths, count)

    monkeypatch.setattr(packing, "_spread", counted)
    assert len(plan_packs([51] * 2000, 100)[0]) == 2000
    assert tries <= 2 * math.ceil(math.log2(2000))


def test_one_long_sequence_does_not_share_while_others_wait() -> None:
    plan = plan_packs([100, 10, 10, 10, 10], 120, dp=2)
    assert [[pack.sequences for pack in packs] for packs in plan] == [[(0,)], [(1, 2, 3, 4)]]


def test_more_ranks_than_sequences() -> None:
    plan = plan_packs([7, 3], 16, dp=4, cp=2, tp=2, multiple=2)
    packs = [pack for rank in plan for pack in rank]
    assert [len(rank) for rank in plan] == [2, 2, 2, 2]
    assert sum(bool(pack.sequences) for pack in packs) == 2
    assert sum(pack == Pack((), (4,)) for pack in packs) == 6


@pytest.mark.parametrize(
    ("longest", "budget", "layout"),
    [(101, 100, {}), (97, 100, {"cp": 4, "tp": 4}), (100, 100, {"tp": 8}), (5, 7, {"cp": 2, "tp": 4})],
)
def test_a_sequence_over_budget_names_the_key_and_a_value_that_works(
    longest: int, budget: int, layout: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as error:
        plan_packs([3, longest, 2], budget, **layout)
    words = str(error.value)
    assert words.startswith("update.tokens_per_microbatch: ")
    assert f"a sequence of {longest}" in words
    least = int(words.rsplit(" ", 1)[1])
    assert least > budget
    plan_packs([3, longest, 2], least, **layout)
    with pytest.raises(UsageError):
        plan_packs([3, longest, 2], least - 1, **layout)


@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    ranks=st.sampled_from([1, 2, 3, 4]),
)
def test_context_ranks_partition_the_pack(chunks: list[int], ranks: int) -> None:
    lengths = [2 * ranks * chunk for chunk in chunks]
    held = [local_positions(lengths, ranks, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(sum(lengths)))
    work = []
    for positions in held:
        assert len(positions) == sum(lengths) // ranks
        start, cost = 0, 0
        for length in lengths:
            mine = positions[(positions >= start) & (positions < start + length)] - start
            assert len(mine) == length // ranks
            assert torch.equal(mine, mine.sort().values), "causal order within a sequence"
            cost += int((mine + 1).sum())  # keys that a token attends to
            start += length
        work.append(cost)
    assert len(set(work)) == 1, "causal attention costs every rank the same"
