import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from lens_megatron.purification.scores import from_optional, interference_scores, to_optional

logprob = st.floats(-40, 0, width=32)


def test_equation_1_by_hand() -> None:
    policy = from_optional([None, -1.0, -0.25, -7.0])
    reference = from_optional([None, -1.0, -2.25, -3.5])
    scores = to_optional(interference_scores(policy, reference))
    assert scores == [None, 0.0, 2.0, 3.5]


@given(st.lists(st.tuples(logprob, logprob), min_size=1, max_size=20))
def test_equation_1_is_symmetric_and_exact_for_float32(pairs: list[tuple[float, float]]) -> None:
    policy = torch.tensor([p for p, _ in pairs], dtype=torch.float32)
    reference = torch.tensor([r for _, r in pairs], dtype=torch.float32)
    scores = interference_scores(policy, reference).tolist()
    assert math.isnan(scores[0])
    assert scores[1:] == [abs(p - r) for p, r in pairs[1:]]
    assert interference_scores(reference, policy).tolist()[1:] == scores[1:]


def test_a_bfloat16_difference_is_not_rounded_again() -> None:
    policy = torch.tensor([0, -8.0625], dtype=torch.bfloat16)
    reference = torch.tensor([0, -0.001], dtype=torch.bfloat16)
    exact = 8.0625 + float(reference[1]) * 1.0
    assert float(interference_scores(policy, reference)[1]) == abs(exact)


def test_two_lengths_are_refused() -> None:
    with pytest.raises(TypeCheckError):
        interference_scores(torch.zeros(3), torch.zeros(4))
