"""Rows that supervised training could not take are found before it begins: it writes no checkpoints."""

from __future__ import annotations

import pytest

from lens_megatron.config import SftConfig
from lens_megatron.data.config import SupervisedDataConfig
from lens_megatron.data.supervised import SupervisedExample
from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.sft import check_lengths

SHORT = SupervisedExample("short", (1, 2), (3, 4))
LONG = SupervisedExample("long", tuple(range(30)), tuple(range(21)))


def config(budget: int, cp: int = 1) -> SftConfig:
    data = SupervisedDataConfig(train="rows.jsonl")
    return SftConfig(model="m", run_dir="r", data=data, tokens_per_microbatch=budget, parallel=ParallelConfig(cp=cp))


def test_a_row_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^tokens_per_microbatch: 50 tokens cannot hold a sequence of 51; set at least 51$"
    ):
        check_lengths([SHORT, LONG, SHORT], config(50), positions=64)
    with pytest.raises(UsageError, match=r"set at least 52$"):
        check_lengths([LONG], config(51, cp=2), positions=64)
    check_lengths([SHORT, LONG], config(51), positions=51)


def test_a_row_past_the_models_positions_is_refused() -> None:
    with pytest.raises(UsageError, match=r"rows\.jsonl: row long has 51 tokens, more than the model's 50 positions"):
        check_lengths([SHORT, LONG], config(64), positions=50)
