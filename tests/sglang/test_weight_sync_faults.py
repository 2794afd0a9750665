"""What becomes of a sync when a real server dies, hangs or refuses in the middle of it: never a hang, never a server
that is handed to the engine with weights that are not whole. The two servers are used up in the order of the tests."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.rollout.sglang_server import ServerProcess
from lens_megatron.rollout.weight_sync.config import SyncConfig
from tests.distributed.pool import WorkerPool
from tests.sglang import sync_cases
from tests.sglang.meddler import late, meddler, page
from tests.sglang.test_weight_sync import SMALL, address, engine_logprobs, weight_version

pytestmark = pytest.mark.sglang

LIMIT_S = 6.0  # rollout.sync.timeout_s here; a whole sync asks one after the other, and so may take a few of them
TOKENS = [[5, 9, 11, 40, 41, 3, 77]]


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["qwen3"]


def processes(server: ServerProcess) -> list[int]:
    """All of the server but its guard."""
    assert server._process is not None
    return [child.pid for child in psutil.Process(server._process.pid).children(recursive=True)]


def open_trainer(pool: WorkerPool, folder: Path, to: list[ServerProcess], tmp_path: Path, **changes: Any) -> None:
    config = SyncConfig(bucket_mib=SMALL, timeout_s=LIMIT_S, **changes)
    pool.run(sync_cases.open_trainer, folder, ParallelConfig(tp=2), [address(s) for s in to], config, tmp_path)


def has_the_trainers_weights(pool: WorkerPool, server: ServerProcess, version: int) -> bool:
    ((logprobs, name),) = engine_logprobs(server, TOKENS)
    expected = pool.run(sync_cases.logprobs, TOKENS)[0][0]
    return name.partition(".")[0] == str(version) and logprobs == pytest.approx(expected, abs=1e-4)


def test_refused_bucket_falls_back_to_disk(
    pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path
) -> None:
    open_trainer(pool, folder, two, tmp_path, transport="distributed")
    synced, seconds = pool.run(sync_cases.sync_while, 1, "close", address(two[1]))[0]
    assert not isinstance(synced, str), synced
    assert (synced.transport, synced.fell_back, synced.servers) == ("disk", True, 2)
    assert "update_weights_from_distributed was refused (400)" in synced.complaints[0]
    assert seconds < 3 * LIMIT_S
    assert all(has_the_trainers_weights(pool, server, 1) for server in two)
    pool.run(sync_cases.train_once, 1)
    again = pool.run(sync_cases.sync, 2)[0]  # with new groups
    assert not isinstance(again, str), again
    assert (again.transport, again.servers) == ("distributed", 2)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_refused_bucket_without_a_way_out(
    pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path, transport: Any
) -> None:
    open_trainer(pool, folder, two[:1], tmp_path, transport=transport, fallback="none")
    said, seconds = pool.run(sync_cases.sync_while, 1, "close", address(two[0]))[0]
    assert isinstance(said, str)
    assert "version 1 reached no rollout server whole" in said
    assert "refused (400)" in said
    assert "\n" not in said
    assert seconds < 3 * LIMIT_S
    assert weight_version(two[0]).partition(".")[0] != "1"
    assert pool.run(sync_cases.synced_servers)[0] == []
    assert not isinstance(pool.run(sync_cases.sync, 2)[0], str)
    assert has_the_trainers_weights(pool, two[0], 2)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_hanging_server(
    pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path, transport: Any
) -> None:
    """It is left out within the time limit, the other one has the weights; when it goes on, the next sync reaches it."""
    open_trainer(pool, folder, two, tmp_path, transport=transport)
    hanging = processes(two[1])
    try:
        synced, seconds = pool.run(sync_cases.sync_while, 1, "stop", hanging)[0]
    finally:
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)
    assert not isinstance(synced, str), synced
    assert (synced.servers, synced.lost) == (1, 1)
    assert f"no answer within {LIMIT_S:g} s" in " ".join(synced.complaints)
    assert seconds < 5 * LIMIT_S
    assert pool.run(sync_cases.synced_servers)[0] == [[two[0].url]]
    assert has_the_trainers_weights(pool, two[0], 1)
    assert weight_version(two[1]).partition(".")[0] != "1"
    pool.run(sync_cases.train_once, 1)
    later = pool.run(sync_cases.sync, 2)[0]
    assert not isinstance(later, str), later
    assert later.servers == 2, later.complaints
    assert all(has_the_trainers_weights(pool, server, 2) for server in two)


@pytest.mark.parametrize(
    "transport, how",
    [("tensor", "garbage"), ("tensor", "late"), ("distributed", "garbage"), ("distributed", "late")],
)
def test_a_bucket_answered_by_garbage_or_too_late(
    pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path, transport: Any, how: str
) -> None:
    """The server took the bucket, and nobody can know: by tensor it is left out; a broadcast, which all share, is given
    up, and the folder reaches both. The next sync is by the transport again."""
    with meddler(two[1].url) as between:
        spoiled = replace(address(two[1]), url=between.url)
        config = SyncConfig(bucket_mib=SMALL, timeout_s=LIMIT_S, transport=transport)
        servers = [address(two[0]), spoiled]
        pool.run(sync_cases.open_trainer, folder, ParallelConfig(tp=2), servers, config, tmp_path)
        between.spoil(f"/update_weights_from_{transport}", page if how == "garbage" else late(4 * LIMIT_S), times=1)
        began = time.monotonic()
        synced = pool.run(sync_cases.sync, 1)[0]
        assert time.monotonic() - began < 4 * LIMIT_S
        assert not isinstance(synced, str), synced
        assert between.spoiled == 1
        assert ("no JSON" if how == "garbage" else f"no answer within {LIMIT_S:g} s") in " ".join(synced.complaints)
        assert has_the_trainers_weights(pool, two[0], 1)
        if transport == "tensor":
            assert (synced.servers, synced.lost, synced.fell_back) == (1, 1, False)
            assert weight_version(two[1]) == "refused-1"
        else:
            assert (synced.transport, synced.servers, synced.fell_back) == ("disk", 2, True)
            assert has_the_trainers_weights(pool, two[1], 1)
        pool.run(sync_cases.train_once, 1)
        later = pool.run(sync_cases.sync, 2)[0]
        assert not isinstance(later, str), later
        assert (later.transport, later.servers) == (transport, 2), later.complaints
        assert all(has_the_trainers_weights(pool, server, 2) for server in two)


def test_server_killed(pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path) -> None:
    """In the middle of a broadcast that both take part in: the other one still gets the version, by disk."""
    open_trainer(pool, folder, two, tmp_path, transport="distributed")
    synced, seconds = pool.run(sync_cases.sync_while, 1, "kill", processes(two[1]))[0]
    assert not isinstance(synced, str), synced
    assert (synced.transport, synced.servers, synced.lost) == ("disk", 1, 1)
    assert seconds < 5 * LIMIT_S
    assert pool.run(sync_cases.synced_servers)[0] == [[two[0].url]]
    assert has_the_trainers_weights(pool, two[0], 1)


def test_last_server_killed(pool: WorkerPool, two: list[ServerProcess], folder: Path, tmp_path: Path) -> None:
    open_trainer(pool, folder, two[:1], tmp_path, transport="tensor")
    said, seconds = pool.run(sync_cases.sync_while, 1, "kill", processes(two[0]))[0]
    assert isinstance(said, str)
    assert "version 1 reached no rollout server whole" in said
    assert "\n" not in said
    assert seconds < 5 * LIMIT_S
    assert pool.run(sync_cases.synced_servers)[0] == []
