"""Which strategies ask the models before anything is generated; the scores themselves: tests/test_score.py, tests/loop."""

from __future__ import annotations

from typing import get_args

import pytest

from lens_megatron.algorithms.rescue import RescueConfig
from lens_megatron.prompt_signals import PromptSignals
from lens_megatron.purification.config import Strategy
from lens_megatron.purification.strategies import Signals
from lens_megatron.types import Prompt

PROMPT = Prompt("p", (1, 2, 3), (1, 3), "1", "", "a question")
ASK_MODELS = {"interference", "gradient"}


@pytest.mark.parametrize("strategy", [*get_args(Strategy), "none"])
def test_models_are_asked_by_those_that_need_them(strategy: str) -> None:
    rescue = RescueConfig(mode="none") if strategy == "none" else RescueConfig(mode="purification", strategy=strategy)
    signals = PromptSignals(None, None, rescue, 100)  # type: ignore[arg-type]
    assert signals.needs_models == (strategy in ASK_MODELS)
    if strategy in ASK_MODELS:
        with pytest.raises((AttributeError, AssertionError)):
            signals.of([PROMPT])
    else:
        assert signals.of([PROMPT, PROMPT]) == [Signals(), Signals()]
