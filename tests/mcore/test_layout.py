"""A layout that cannot work is refused with one line that says what would be right."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig, check_budget, check_layout, padded_vocab_size
from lens_megatron.mcore.packing import plan_packs
from lens_megatron.model_spec import ModelSpec, MoESpec, load_model_spec, shipped_models

DENSE = ModelSpec(
    family="qwen3",
    layers=12,
    hidden_size=64,
    ffn_size=96,
    heads=16,
    kv_heads=4,
    head_dim=16,
    vocab_size=1000,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=512,
    tied=False,
    qkv_bias=False,
    qk_norm=True,
)
MOE = dataclasses.replace(
    DENSE, family="qwen3_moe", moe=MoESpec(experts=12, experts_per_token=2, expert_ffn_size=20), layers=94
)

REFUSED: list[tuple[str, ModelSpec, dict[str, Any], int, str, list[str]]] = [
    # name, model, layout, processes, key, words
    ("heads", DENSE, {"tp": 3}, 3, "tp", ["tp=3 does not divide the 16 attention heads", "tp may be one of 1, 2, 4"]),
    ("kv heads", DENSE, {"tp": 8}, 8, "tp", ["tp=8 does not divide the 4 key/value heads", "one of 1, 2, 4"]),
    (
        "ffn",
        dataclasses.replace(DENSE, ffn_size=98),
        {"tp": 4},
        4,
        "tp",
        ["tp=4 does not divide the 98 MLP columns", "tp may be one of 1, 2"],
    ),
    ("layers", DENSE, {"pp": 5}, 5, "pp", ["pp x vpp = 5 does not divide 12 layers", "one of 1, 2, 3, 4, 6, 12"]),
    ("virtual", DENSE, {"pp": 2, "vpp": 4}, 2, "pp", ["pp x vpp = 8 does not divide 12 layers", "one of 1, 2, 3"]),
    ("virtual alone", DENSE, {"vpp": 2}, 1, "vpp", ["need pp > 1"]),
    (
        "94 layers",
        MOE,
        {"pp": 4},
        4,
        "pp",
        ["does not divide 94 layers", "parallel.ends_count_as_layers=true would fit"],
    ),
    (
        "ends",
        DENSE,
        {"pp": 4, "ends_count_as_layers": True},
        4,
        "pp",
        ["12 layers + embedding + head", "ends_count_as_layers=false would fit"],
    ),
    ("sp alone", DENSE, {"sp": True}, 1, "sp", ["needs tp > 1", "leave sp out"]),
    ("experts without sp", MOE, {"tp": 2, "sp": False}, 2, "sp", ["need sequence parallelism", "parallel.sp=true"]),
    ("etp", MOE, {"tp": 2, "etp": 1}, 2, "etp", ["must be tp=2", "leave it out"]),
    ("experts", MOE, {"ep": 8}, 8, "ep", ["ep=8 does not divide the 12 experts", "one of 1, 2, 3, 4, 6, 12"]),
    (
        "expert columns over tp",
        dataclasses.replace(MOE, kv_heads=8),
        {"tp": 8},
        8,
        "tp",
        ["tp=8 does not divide the 20 columns of an expert", "one of 1, 2, 4"],
    ),
    (
        "expert columns",
        MOE,
        {"ep": 2, "etp": 3},
        6,
        "etp",
        ["etp=3 does not divide the 20 columns of an expert", "one of 1, 2, 4, 5, 10, 20"],
    ),
    ("no experts: ep", DENSE, {"ep": 2}, 2, "ep", ["no experts", "leave ep and etp out"]),
    ("no experts: etp", DENSE, {"tp": 2, "etp": 2}, 2, "ep", ["no experts", "leave ep and etp out"]),
    (
        "world",
        DENSE,
        {"tp": 2, "cp": 2},
        6,
        "tp",
        ["tp x pp x cp = 4 does not divide the 6 processes", "multiple of 4"],
    ),
    ("dp", DENSE, {"tp": 2, "dp": 3}, 4, "dp", ["dp=3 needs 6 processes, there are 4"]),
    ("expert world", MOE, {"ep": 4}, 6, "ep", ["ep x etp x pp = 4 does not divide the 6 processes"]),
]


@pytest.mark.parametrize(
    ("spec", "layout", "world", "key", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_with_what_would_be_right(
    spec: ModelSpec, layout: dict[str, Any], world: int, key: str, words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        check_layout(spec, ParallelConfig(**layout), world)
    message = str(error.value)
    assert message.startswith(f"parallel.{key}: ")
    assert "\n" not in message
    for part in words:
        assert part in message


@pytest.mark.parametrize("row", REFUSED, ids=[row[0] for row in REFUSED])
def test_the_values_offered_do_work(row: tuple[str, ModelSpec, dict[str, Any], int, str, list[str]]) -> None:
    """Whatever a refusal offers is accepted."""
    _, spec, layout, world, key, _ = row
    with pytest.raises(UsageError) as error:
        check_layout(spec, ParallelConfig(**layout), world)
    message = str(error.value)
    if offered := re.search(r"(?:may be one of|; one of) ([\d, ]+)$", message):
        for value in offered[1].split(", "):
            changed = {**layout, key: int(value)} if key != "pp" else {**layout, "pp": int(value), "vpp": 1}
            proposal = ParallelConfig(**changed)
            check_layout(spec, proposal, proposal.processes)
    elif hint := re.search(r"parallel\.ends_count_as_layers=(true|false) would fit", message):
        check_layout(spec, ParallelConfig(**{**layout, "ends_count_as_layers": hint[1] == "true"}), world)


@pytest.mark.parametrize(
    ("spec", "layout", "world"),
    [
        (DENSE, {}, 1),
        (DENSE, {}, 7),
        (DENSE, {"tp": 4, "pp": 3, "vpp": 2, "cp": 2}, 48),
        (DENSE, {"tp": 2, "sp": False}, 2),
        (DENSE, {"tp": 2, "dp": 3}, 6),
        (MOE, {"tp": 4, "pp": 8, "ends_count_as_layers": True, "ep": 4}, 32),
        (MOE, {"ep": 4, "etp": 1, "tp": 2}, 4),
        (MOE, {"tp": 2, "ep": 2, "etp": 2}, 4),
        (MOE, {"tp": 2, "pp": 2}, 4),
    ],
)
def test_accepted(spec: ModelSpec, layout: dict[str, Any], world: int) -> None:
    check_layout(spec, ParallelConfig(**layout), world)


@pytest.mark.parametrize("name", ["tp", "pp", "vpp", "cp", "ep", "etp", "dp"])
def test_sizes_start_at_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least 1 \(got 0\)"):
        ParallelConfig(**{name: 0})


def test_defaults_that_follow_from_others() -> None:
    assert not ParallelConfig().sequence_parallel
    assert ParallelConfig(tp=2).sequence_parallel
    assert not ParallelConfig(tp=2, sp=False).sequence_parallel
    assert [ParallelConfig(tp=4).expert_tp, ParallelConfig(tp=4, ep=2).expert_tp] == [4, 1]
    assert ParallelConfig(tp=4, ep=2, etp=2).expert_tp == 2
    assert ParallelConfig(tp=2, pp=3, cp=2).processes == 12
    assert ParallelConfig(tp=2, dp=4).processes == 8
    # enough copies of the model that the experts find their ranks
    assert ParallelConfig(ep=8, tp=2).processes == 8
    assert ParallelConfig(ep=4, pp=2, tp=2).processes == 8


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("vocabulary", [1, 125, 128, 129, 151_936, 128_256])
def test_padded_vocabulary(tp: int, vocabulary: int) -> None:
    spec = dataclasses.replace(DENSE, vocab_size=vocabulary)
    padded = padded_vocab_size(spec, tp)
    assert padded % tp == 0
    assert padded % 128 == 0
    assert 0 <= padded - vocabulary < 128 * tp
    if 128 % tp == 0:
        assert padded == padded_vocab_size(spec, 1), "a checkpoint of one tp loads in another"


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_models_fit_on_one_process(name: str) -> None:
    check_layout(load_model_spec(name), ParallelConfig(), 1)


@pytest.mark.parametrize(
    "layout", [ParallelConfig(), ParallelConfig(tp=4), ParallelConfig(cp=2), ParallelConfig(cp=4, tp=3)]
)
@pytest.mark.parametrize("longest", [1, 7, 64, 101])
def test_the_least_budget_that_is_accepted_is_the_least_that_packs(layout: ParallelConfig, longest: int) -> None:
    for budget in range(longest, longest + 40):
        try:
            check_budget("update.tokens_per_microbatch", budget, longest, layout)
        except UsageError as error:
            assert f"{budget} tokens cannot hold a sequence of {longest}" in str(error)
            least = int(str(error).split()[-1])
            continue
        assert budget == longest or budget >= least
        for packs in plan_packs([longest, 1], budget, cp=layout.cp, tp=layout.tp):
            assert all(pack.tokens <= budget for pack in packs)
        if budget > longest:
            assert budget == least
        return
    raise AssertionError("no budget was accepted")
