"""The reference's scores of prompts: asked for once, the same ever after, and never under other weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_megatron.reference_scores import ReferenceScores, identity_of
from lens_megatron.types import Prompt


def prompt(*tokens: int) -> Prompt:
    return Prompt(id=f"p{len(tokens)}", tokens=tokens, question=(0, len(tokens)), answer="")


class Reference:
    """Says something else each time it is asked, as other packings do in their last bits."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        self.asked += [p.tokens for p in prompts]
        return [torch.rand(len(p.tokens)) for p in prompts]


A, B, C = prompt(1, 2, 3), prompt(4, 5), prompt(1, 2)


def test_a_prompt_is_scored_once_and_answers_keep_their_order() -> None:
    scores, reference = ReferenceScores("id"), Reference()
    a, b, again = scores.of([A, B, A], reference)
    assert reference.asked == [A.tokens, B.tokens] and a is again
    assert scores.counted() == 0  # in the same batch it was not known yet
    c, b2, a2 = scores.of([C, B, A], reference)
    assert reference.asked == [A.tokens, B.tokens, C.tokens]
    assert len(c) == 2 and torch.equal(b, b2) and torch.equal(a, a2)
    assert scores.counted() == pytest.approx(2 / 3) and scores.counted() is None


def test_the_state_goes_on_bit_for_bit_under_the_same_identity_only() -> None:
    scores, reference = ReferenceScores("id"), Reference()
    first = scores.of([A, B], reference)
    state = json.loads(json.dumps(scores.state_dict()))  # as a checkpoint keeps it
    resumed, other, unasked = ReferenceScores("id"), ReferenceScores("another layout"), Reference()
    assert resumed.load_state_dict(state) and not other.load_state_dict(state)
    assert all(map(torch.equal, first, resumed.of([A, B], unasked))) and unasked.asked == []
    other.of([A], unasked)
    assert unasked.asked == [A.tokens]
    empty = ReferenceScores("id")
    assert empty.load_state_dict(ReferenceScores("id").state_dict())


def test_what_does_not_fit_is_scored_each_time_also_after_a_resume() -> None:
    reference = Reference()
    full = ReferenceScores("id", most_tokens=4)
    full.of([A, B], reference)
    resumed = ReferenceScores("id", most_tokens=4)
    resumed.load_state_dict(full.state_dict())
    for scores in (full, resumed):
        reference.asked.clear()
        scores.of([A, B], reference)
        assert reference.asked == [B.tokens]


def test_other_files_are_another_identity(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    before = identity_of(tmp_path, "bf16", 2)
    assert identity_of(tmp_path, "bf16", 2) == before != identity_of(tmp_path, "fp32", 2)
    (file,) = tmp_path.glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    assert identity_of(tmp_path, "bf16", 2) != before
