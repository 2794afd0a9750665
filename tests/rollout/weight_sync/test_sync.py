"""Whole syncs by two ranks, to a STUB of a server that takes any weights. tests/sglang has the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.rollout.sglang_server import ServerAddress
from lens_megatron.rollout.weight_sync.config import SyncConfig
from tests import tiny_models
from tests.distributed.pool import WorkerPool
from tests.rollout.test_sglang_client import stub_server
from tests.rollout.test_sglang_server import launched
from tests.sglang import sync_cases


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    tiny_models.save_hf("qwen3", folder)
    return folder


def open_trainer(pool: WorkerPool, model: Path, url: str, run: Path, silence_s: float = 60.0, **changes: Any) -> None:
    settings = {"probe_tolerance": 1e9, "checksums": False, "timeout_s": 20.0, **changes}
    config, address = SyncConfig(**settings), ServerAddress("s", url, None, 1)
    pool.run(sync_cases.open_trainer, model, ParallelConfig(tp=2), [address], config, run, silence_s=silence_s)


def test_ranks_wait_for_rank_zeros_transfer_as_long_as_it_lives(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    """The server takes longer than a rank may show no sign of life."""
    with stub_server("--update-seconds", "6.5") as url:
        open_trainer(pool, model, url, tmp_path, silence_s=3.0, transport="tensor", fallback="none")
        said = pool.run(sync_cases.sync, 1)
    assert not isinstance(said[0], str), said
    assert said[0].servers == 1 and said[1].version == 1


def test_each_attempt_has_a_label_of_its_own(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    """The first is refused by the probe when it has been released already; only the second one's is told to the engine,
    and only it is in the proof beside the weights on disk."""
    with stub_server() as url:
        open_trainer(pool, model, url, tmp_path, transport="tensor")
        released = pool.run(sync_cases.released_labels, 1, "first_probe_differs")[0]
        (accepted,) = pool.run(sync_cases.labels)[0]
    assert len(set(released)) == 2 and all(label.startswith("1.") for label in released)
    assert accepted == released[1]
    assert json.loads((tmp_path / "weights" / "version_000001" / "proved.json").read_text())["label"] == accepted


def test_resuming_below_versions_that_are_on_disk(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    for version in (7, 8):
        (tmp_path / "weights" / f"version_{version:06d}").mkdir(parents=True)
    with stub_server() as url:
        open_trainer(pool, model, url, tmp_path, transport="disk")
        for version in (5, 6):
            synced = pool.run(sync_cases.sync, version)[0]
            assert not isinstance(synced, str), synced
    kept = sorted((tmp_path / "weights").iterdir())
    assert [folder.name for folder in kept] == ["version_000005", "version_000006"]
    assert all((folder / "proved.json").exists() for folder in kept)


def test_a_transport_that_keeps_failing_is_not_tried_for_ever(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    """Here because the server has pipeline stages; elsewhere each failure may take the whole time limit."""
    with stub_server("--pp", "2") as url:
        open_trainer(pool, model, url, tmp_path, transport="distributed")
        found = [pool.run(sync_cases.sync, version)[0] for version in range(1, 5)]
    assert all((synced.transport, synced.fell_back, synced.servers) == ("disk", True, 1) for synced in found)
    for synced in found[:3]:
        (complaint,) = synced.complaints
        assert complaint.startswith(f"by distributed: {url} has pipeline stages")
    assert "(3 times in a row: distributed is not tried again in this run)" in found[2].complaints[0]
    assert "in a row" not in found[1].complaints[0] and found[3].complaints == ()


STUCK = {"TOKEN_SECONDS": "0.001", "FAULT": "stuck_by_group"}


def test_servers_that_a_failed_broadcast_left_hanging_are_started_again(
    pool: WorkerPool, model: Path, tmp_path: Path
) -> None:
    """NCCL's broadcast is never over on the servers' GPUs: none of them takes the folder either."""
    open_trainer(pool, model, "http://nobody", tmp_path, transport="distributed", timeout_s=2.0)
    pool.run(sync_cases.start_servers, launched(restarts=2, env=STUCK), 2, tmp_path / "logs")
    synced = pool.run(sync_cases.sync, 1)[0]
    assert not isinstance(synced, str), synced
    assert (synced.version, synced.transport, synced.fell_back) == (1, "disk", True)
    assert [words.split(":")[0] for words in synced.complaints] == ["by distributed", "by disk"]
    reached = pool.run(sync_cases.servers)[0]
    assert len(reached) == synced.servers >= 1 and all(starts == 2 for _, starts in reached)
    pool.run(sync_cases.close_trainer)


def test_servers_left_hanging_that_cannot_be_started_again(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    open_trainer(pool, model, "http://nobody", tmp_path, transport="distributed", timeout_s=2.0)
    pool.run(sync_cases.start_servers, launched(restarts=0, env=STUCK), 1, tmp_path / "logs")
    said = pool.run(sync_cases.sync, 1)[0]
    assert "a stub joins no group" in said and "flush_cache: no answer within 2 s" in said
    assert said.endswith("(given by URL, or rollout.server.restarts is used up): restart them") and "\n" not in said
    pool.run(sync_cases.close_trainer)
