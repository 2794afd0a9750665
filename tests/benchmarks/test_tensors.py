"""The fast ways into tensors give what torch.tensor gives, bit by bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.samples import number_tensor, token_tensor

TOKENS = st.lists(st.integers(0, 2**40)).map(tuple)


@given(prompt=TOKENS, response=TOKENS)
def test_tokens(prompt: tuple[int, ...], response: tuple[int, ...]) -> None:
    expected = torch.tensor([*prompt, *response], dtype=torch.long)
    found = token_tensor(prompt, response)
    assert found.dtype == torch.long and torch.equal(found, expected)


@given(values=st.lists(st.floats(-1e30, 1e30)).map(tuple))
def test_numbers(values: tuple[float, ...]) -> None:
    expected = torch.tensor(values, dtype=torch.float32)
    assert number_tensor(values).view(torch.int32).tolist() == expected.view(torch.int32).tolist()
