import itertools
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.purification.seeds import choose, seed_for, uniform


def test_another_process_draws_the_same() -> None:
    """Python salts hash() anew in each; a seed must not depend on it."""
    code = "from lens_megatron.purification.seeds import *; print(seed_for(1, 2, 'p', 'x'), choose(range(50), 9, 7))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    assert outputs == {f"{seed_for(1, 2, 'p', 'x')} {choose(range(50), 9, 7)}\n"}


def test_every_argument_counts() -> None:
    calls = [(0, 0, "p", "a"), (1, 0, "p", "a"), (0, 1, "p", "a"), (0, 0, "q", "a"), (0, 0, "p", "b")]
    assert len({seed_for(*call) for call in calls}) == len(calls)
    # a joined string would confuse these
    assert seed_for(1, 11, "p", "a") != seed_for(11, 1, "p", "a")
    assert seed_for(0, 0, "p|a", "b") != seed_for(0, 0, "p", "a|b")


@given(st.integers(0, 12), st.data(), st.integers(0, 2**64 - 1))
def test_choice_is_an_ordered_subset(size: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, size))
    chosen = choose(range(size), count, seed)
    assert len(chosen) == count
    assert list(chosen) == sorted(set(chosen))


def test_every_subset_is_equally_likely() -> None:
    draws = 6000
    counts = Counter(choose(range(4), 2, seed_for(0, step, "p", "x")) for step in range(draws))
    assert set(counts) == set(itertools.combinations(range(4), 2))
    expected = draws / 6
    # chi-squared with 5 degrees of freedom: 20.5 is passed by chance once in a thousand; the seeds are fixed
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20.5


def test_uniform_fills_the_interval() -> None:
    values = sorted(uniform(seed_for(0, step, "p", "u")) for step in range(2000))
    assert max(abs(value - (i + 0.5) / 2000) for i, value in enumerate(values)) < 0.045  # Kolmogorov-Smirnov, p = .001


def test_too_many_are_refused() -> None:
    with pytest.raises(ValueError):
        choose([1, 2], 3, 0)
