"""The batch in flight, through a checkpoint's JSON and back."""

from __future__ import annotations

import json

import torch

from lens_megatron.ahead import Ahead
from lens_megatron.purification.scores import interference_scores
from lens_megatron.purification.strategies import Signals
from lens_megatron.rollout.sampling import SampleCounts, SampleResult
from lens_megatron.types import Prompt


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
