"""Which transports a run tries, and what it says to NCCL before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import cuda_environment
from lens_megatron.config import load_run
from lens_megatron.engine_side import EngineSide
from lens_megatron.rollout import sglang_supervised
from lens_megatron.rollout.weight_sync import process_group
from lens_megatron.rollout.weight_sync.transports import make_transports
from tests.loop.runs import run_tree, write_run

DISAGGREGATED, COLOCATED = "placement=disaggregated", "placement=colocated"
STAGES, TENSOR, BY_BROADCAST = (
    "rollout.server.args={pp_size: 2}",
    "rollout.sync.transport=tensor",
    "rollout.sync.transport=distributed",
)


def config_of(tmp_path: Path, *overrides: str) -> Any:
    run = write_run(tmp_path, run_tree(tmp_path, tmp_path / "run"))
    return load_run(run, ["rollout.engine=sglang", *overrides])


@pytest.mark.parametrize(
    ("overrides", "supervised", "names"),
    [
        ([DISAGGREGATED], False, ["distributed", "disk"]),
        ([DISAGGREGATED], True, ["distributed", "disk"]),
        ([COLOCATED], False, ["tensor"]),
        ([COLOCATED], True, ["disk"]),  # on other nodes than rank 0: weights in the body of a request take hours
        ([COLOCATED, TENSOR], True, ["tensor"]),
        ([STAGES], False, ["disk"]),
        ([STAGES, BY_BROADCAST], False, ["distributed", "disk"]),
    ],
)
def test_what_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], supervised: bool, names: list[str]
) -> None:
    if supervised:
        monkeypatch.setenv(sglang_supervised.FOLDER, str(tmp_path))
    config = config_of(tmp_path, *overrides)
    side = EngineSide(config, None)
    found = make_transports(
        config.rollout.sync, tmp_path, tmp_path, "cuda", config.placement == "colocated", side._only_disk_is_fast()
    )
    assert [transport.name for transport in found] == names


@pytest.mark.parametrize(
    ("overrides", "before", "after"),
    [
        ([DISAGGREGATED], None, "0"),
        ([DISAGGREGATED], "1", "1"),
        ([DISAGGREGATED, TENSOR], None, None),
        ([COLOCATED], None, None),
        (["rollout.engine=embedded"], None, None),
    ],
)
def test_memory_is_offered_as_sglang_offers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], before: str | None, after: str | None
) -> None:
    name = cuda_environment.PEER_MEMORY
    monkeypatch.setenv(name, "put back afterwards")
    monkeypatch.delenv(name) if before is None else monkeypatch.setenv(name, before)
    config = config_of(tmp_path, *overrides)
    cuda_environment.prepare(config.parallel, config)
    assert os.environ.get(name) == after


def test_what_nccl_does_not_say() -> None:
    refused = RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)")
    assert "NCCL refuses a peer of another version" in process_group.advice(refused)
    assert process_group.advice(RuntimeError("connection closed")) == ""
