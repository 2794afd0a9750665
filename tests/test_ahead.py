"""The batch in flight, through a checkpoint's JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch

from lens_megatron.ahead import Ahead
from lens_megatron.purification.scores import interference_scores
from lens_megatron.purification.strategies import Signals
from lens_megatron.rollout.sampling import SampleCounts, SampleResult
from lens_megatron.routed_experts import Routing
from lens_megatron.types import Group, Prompt, Rollout


def test_scores_come_back_bit_for_bit() -> None:
    scores_T = interference_scores(torch.tensor([0.0, -1.1, -2.7]), torch.tensor([0.0, -1.3, -2.6]))
    prompts = [Prompt("p", (1, 5, 6), (1, 3), "42")]
    result = SampleResult([], SampleCounts())
    made = Ahead(3, prompts, {}, [Signals(scores_T, None, 1e-6)], result)
    found = Ahead(3, prompts, {})
    found.restore(json.loads(json.dumps(made.tree())))
    [signal] = found.signals
    assert signal.scores_T is not None and signal.scores_T.dtype == scores_T.dtype
    assert torch.equal(signal.scores_T.nan_to_num(-1.0), scores_T.nan_to_num(-1.0)) and signal.scores_T[0].isnan()
    assert signal.gradient_norms_T is None and signal.measured_floor == 1e-6 and found.result == result


def test_rollouts_come_back_and_those_with_experts_are_made_again() -> None:
    prompt = Prompt("p", (1, 5, 6), (1, 3), "42")
    rollout = Rollout("p", (1, 5, 6), (7, 8), (-0.5, -0.25), "stop", 0, weight_version=2)
    signals = [Signals(None, None, None)]

    def ahead(*rollouts: Rollout) -> Ahead:
        return Ahead(3, [prompt], {}, signals, SampleResult([Group(prompt, rollouts)], SampleCounts(seconds=1.5)))

    found = Ahead(3, [prompt], {})
    found.restore(json.loads(json.dumps(ahead(rollout).tree())))
    assert found.result == ahead(rollout).result
    told = Routing.of(np.full((4, 6), 200))
    assert ahead(rollout, replace(rollout, routing=told)).tree() is None
