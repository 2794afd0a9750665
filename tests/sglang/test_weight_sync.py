"""The trainer's weights at the real server, after real updates, by every transport and from cut-up models."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient
from lens_megatron.rollout.sglang_server import ServerAddress, ServerProcess
from lens_megatron.rollout.weight_sync.config import SyncConfig
from tests import tiny_models
from tests.distributed.pool import WorkerPool
from tests.sglang import sync_cases
from tests.sglang.server import UNDER_WAY_AND_AWAITED, cpu_config, servers

pytestmark = pytest.mark.sglang
T = TypeVar("T")

SMALL = 0.06  # MiB: the tiny model in several buckets


@pytest.fixture
def server(two: list[ServerProcess]) -> ServerProcess:
    return two[0]


@pytest.fixture(scope="module")
def bf16_server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    config = cpu_config(args={"dtype": "bfloat16"})
    with servers(folders["tied_bf16"], tmp_path_factory.mktemp("logs"), config=config) as (one,):
        yield one


def address(server: ServerProcess, shares_memory: bool = True) -> ServerAddress:
    return ServerAddress(server.name, server.url, server.api_key, server.starts, shares_memory=shares_memory)


def ask(server: ServerProcess, verb: Callable[[SGLangClient], Coroutine[Any, Any, T]]) -> T:
    loop = EventLoop()
    client = SGLangClient(server.url, server.api_key)
    try:
        return loop.run(verb(client))
    finally:
        loop.run(client.close())
        loop.close()


def engine_logprobs(server: ServerProcess, sequences: list[list[int]]) -> list[tuple[tuple[float, ...], str]]:
    return [
        ask(server, lambda client, i=i, tokens=tokens: client.prompt_logprobs(f"look/{i}/", tokens))
        for i, tokens in enumerate(sequences)
    ]


def weight_version(server: ServerProcess) -> str:
    return ask(server, lambda client: client.weight_version())


@pytest.mark.parametrize("transport", ["tensor", "disk", "distributed"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_the_engine_is_the_trainer_after_every_sync(
    pool: WorkerPool, server: ServerProcess, folders: dict[str, Path], tmp_path: Path, transport: Any, layout: Any
) -> None:
    config = SyncConfig(transport=transport, fallback="none", bucket_mib=SMALL, timeout_s=30.0)
    to = address(server, shares_memory="tp" in layout)  # of tensor: once by shared memory, once in the body
    pool.run(sync_cases.open_trainer, folders["qwen3"], ParallelConfig(**layout), [to], config, tmp_path)
    sequences = [s.tolist() for s in tiny_models.random_sequences(3, seed=5) if len(s) > 3]
    seen = []
    for version in (1, 2, 3):
        synced = pool.run(sync_cases.sync, version)[0]
        assert not isinstance(synced, str), synced
        assert (synced.servers, synced.lost, synced.fell_back) == (1, 0, False)
        assert synced.probe_max < 1e-4
        expected = pool.run(sync_cases.logprobs, sequences)[0]
        for (engine, name), trainer in zip(engine_logprobs(server, sequences), expected, strict=True):
            assert name.partition(".")[0] == str(version)
            assert engine == pytest.approx(trainer, abs=1e-4)
        seen.append(expected)
        ledger = json.loads((tmp_path / "sync" / f"version_{version:06d}.json").read_text())
        assert ledger["transport"] == transport
        assert sum(entry["bytes"] for entry in ledger["tensors"]) == ledger["bytes"] == synced.bytes
        assert all(entry["exported"] == entry["sent"] for entry in ledger["tensors"])
        buckets = {entry["bucket"] for entry in ledger["tensors"]}
        assert transport == "disk" or len(buckets) > 3
        assert sorted(ledger["acknowledged"][server.url]) == sorted(buckets)
        assert pool.run(sync_cases.train_once, version)[0] > 0
    assert abs(torch.tensor(seen[0][0]) - torch.tensor(seen[2][0])).max() > 1e-2  # or nothing was shown
    assert pool.run(sync_cases.synced_servers)[0] == [[server.url]] * 3
    names = pool.run(sync_cases.groups)[0]
    assert len(names) == (layout.get("pp", 1) if transport == "distributed" else 0)
    pool.run(sync_cases.close_trainer)
    for name in names:
        with pytest.raises(Refused, match="does not exist"):  # it left when the trainer did
            ask(server, lambda client, name=name: client.destroy_weights_update_group(name))


# one update at lr 1e-6 in bf16 moves log-probs less than the engine's own noise: bytes must be compared
PLANTS = {
    "stale_buffer": "what was sent is not what left the model",
    "stale_at_server": "holds other weights than were exported",
    "bucket_never_sent": "weights were never sent",
    "bucket_lost_by_server": "holds other weights than were exported",
    "bucket_not_acknowledged": "did not take buckets",
}
_NEVER_LOST = ("bucket_lost_by_server", "distributed")


# a broadcast that a server never takes is no lost bucket: it is noticed as such
@pytest.mark.parametrize(
    ("plant", "transport"), [(p, t) for p in PLANTS for t in ("tensor", "distributed") if (p, t) != _NEVER_LOST]
)
def test_planted_in_bf16_after_one_step_at_a_small_rate(
    pool: WorkerPool, bf16_server: ServerProcess, folders: dict[str, Path], tmp_path: Path, plant: str, transport: Any
) -> None:
    config = SyncConfig(transport=transport, fallback="none", bucket_mib=SMALL, timeout_s=30.0, scramble=False)
    layout = ParallelConfig(tp=2)
    servers_ = [address(bf16_server)]
    pool.run(sync_cases.open_trainer, folders["tied_bf16"], layout, servers_, config, tmp_path, torch.bfloat16, lr=1e-6)
    first = pool.run(sync_cases.sync, 1)[0]
    assert not isinstance(first, str), first
    pool.run(sync_cases.train_once, 1)
    blind = pool.run(sync_cases.sync_with, 2, plant, False)[0]  # by the probe alone: it notices nothing
    assert not isinstance(blind, str), blind
    assert blind.probe_max < 0.5
    pool.run(sync_cases.train_once, 2)
    caught = pool.run(sync_cases.sync_with, 3, plant, True)[0]
    assert isinstance(caught, str)
    assert PLANTS[plant] in caught
    assert weight_version(bf16_server) == (
        "refused-3" if "probe" in caught else "unfinished-3"
    )  # no response can pass for one of good weights
    after = pool.run(sync_cases.sync, 4)[0]
    assert not isinstance(after, str), after
    assert 0 < after.changed < 1  # in bf16 most weights do not move at all
    assert pool.run(sync_cases.synced_servers)[0] == [[bf16_server.url]] * 3


def test_a_scrambled_engine_shows_a_lost_bucket_to_the_probe(
    pool: WorkerPool, bf16_server: ServerProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Where no checksum can be compared (on CUDA): weights made random before the sync are plain in any precision."""
    config = SyncConfig(transport="tensor", fallback="none", bucket_mib=SMALL, timeout_s=30.0)
    layout, servers_ = ParallelConfig(tp=2), [address(bf16_server)]
    pool.run(sync_cases.open_trainer, folders["tied_bf16"], layout, servers_, config, tmp_path, torch.bfloat16, lr=1e-6)
    good = pool.run(sync_cases.sync_with, 1, "", False)[0]
    assert not isinstance(good, str), good
    lost = pool.run(sync_cases.sync_with, 2, "bucket_lost_by_server", False)[0]
    assert isinstance(lost, str)
    assert "log-probs of the probe differ" in lost
    assert not isinstance(pool.run(sync_cases.sync, 3)[0], str)


def test_after_a_sync_in_place_nothing_is_sampled_from_the_cache_of_old_weights(
    pool: WorkerPool, server: ServerProcess, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The prompt was there before, and a rollout that stays in place keeps the cache from being flushed."""
    config = SyncConfig(transport="tensor", fallback="none", bucket_mib=SMALL, timeout_s=30.0, in_flight="in_place")
    pool.run(sync_cases.open_trainer, folders["qwen3"], ParallelConfig(tp=2), [address(server)], config, tmp_path)
    prompt = list(range(3, 103))
    synced = pool.run(sync_cases.sync, 1)[0]
    assert not isinstance(synced, str), synced
    known = _sampled_as_by_the_trainer(pool, server, "before", prompt)
    before = torch.tensor(pool.run(sync_cases.logprobs, [known])[0][0])
    for seed in range(3):
        pool.run(sync_cases.train_once, seed)
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(
            ask, server, lambda client: client.generate("under-way", prompt, UNDER_WAY_AND_AWAITED)
        )
        while not ask(server, lambda client: client.load()).running:
            assert not under_way.done()
        synced = pool.run(sync_cases.sync, 2)[0]
        assert not isinstance(synced, str), synced
        rollout = under_way.result()
    assert [label.partition(".")[0] for label, _, _ in rollout.versions] == ["1", "2"]
    _sampled_as_by_the_trainer(pool, server, "after", prompt)
    after = torch.tensor(pool.run(sync_cases.logprobs, [known])[0][0])
    assert (after - before).abs().max() > 1e-2  # or nothing was shown


def _sampled_as_by_the_trainer(pool: WorkerPool, server: ServerProcess, name: str, prompt: list[int]) -> list[int]:
    answer = ask(server, lambda client: client.generate(name, prompt, 16))
    tokens = [*prompt, *answer.tokens]
    assert answer.logprobs == pytest.approx(pool.run(sync_cases.logprobs, [tokens])[0][0][-16:], abs=1e-4)
    return tokens
