"""Experts on their way from the engine to the trainer's routers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lens_megatron.routed_experts import OWN_CHOICE, Routing


@pytest.mark.parametrize("most, dtype", [(128, "uint8"), (256, "uint8"), (257, "int16"), (512, "int16")])
def test_keeps_every_expert_in_few_bytes(most: int, dtype: str) -> None:
    experts = np.random.default_rng(0).integers(0, most, (9, 4, 2))
    experts[0, 0, 0] = most - 1
    routing = Routing.of(experts)
    assert routing.dtype == dtype and len(routing.data) == experts.size * np.dtype(dtype).itemsize
    assert np.array_equal(routing.experts().reshape(9, 4, 2), experts)
    assert pickle.loads(pickle.dumps(routing)) == routing
    assert hash(routing) == hash(Routing.of(experts)) and routing != Routing.of(experts[:-1])


def test_a_rollout_moved_to_another_prompt_keeps_its_responses_experts() -> None:
    experts = np.random.default_rng(0).integers(0, 8, (9, 6))  # 4 of the prompt, 5 of the response
    routing = Routing.of(experts)
    moved = routing.under(prompt=6, rolled=4)
    assert moved.first == 6 and moved.data is routing.data
    assert np.array_equal(moved.experts(), experts[4:])
    assert routing.first == 0 and np.array_equal(routing.experts(), experts)


def test_a_token_may_be_left_to_the_model() -> None:
    experts = np.array([[[OWN_CHOICE, OWN_CHOICE]], [[3, 5]]])
    assert np.array_equal(Routing.of(experts).experts(), experts.reshape(2, 2))
