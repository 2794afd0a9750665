"""What the trainer's ranks do in tests of weight sync. A rank keeps its policy and its sync from one case to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lens_megatron.errors import RunError
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.rollout.weight_sync.config import SyncConfig
from tests.distributed.cases import start

PROBE = list(range(3, 60, 2))


@dataclass
class FakeDriver:
    """Stands in for the rollout driver: knows the servers, and remembers which it was told are synced."""

    addresses: list[Any]
    synced: list[list[str]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    version: int = -1

    def servers(self) -> list[Any]:
        return self.addresses

    def begin_update(self, version: int) -> None:
        self.version = -1

    def end_update(self, synced: Sequence[Any], label: str) -> None:
        self.labels.append(label)
        self.synced.append([address.url for address in synced])

    def restart_servers(self, silent: Sequence[Any], reason: str) -> bool:
        return False  # they are somebody else's


@dataclass
class Held:
    policy: Any
    sync: Any
    driver: FakeDriver | None
    engine: Any = None  # in the driver's place: starts servers, and starts them again


_held: Held | None = None


def open_trainer(
    folder: Path,
    layout: ParallelConfig,
    addresses: list[Any],
    config: SyncConfig,
    run: Path,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-2,
    silence_s: float = 60.0,
) -> None:
    """A policy in this layout, and its way to the servers."""
    global _held
    from lens_megatron.mcore.optimizer import OptimizerConfig
    from lens_megatron.mcore.step import build_trainable
    from lens_megatron.rollout.weight_sync.sync import WeightSync
    from lens_megatron.rollout.weight_sync.transports import make_transports

    close_trainer()
    spec = start(folder, layout)
    policy = build_trainable(spec, layout, folder, OptimizerConfig(lr=lr), steps=100, dtype=dtype)
    driver = FakeDriver(addresses) if dist.get_rank() == 0 else None
    transports = make_transports(config, run, folder, "cpu")
    sync = WeightSync(config, policy, transports, PROBE, driver, run / "sync" if driver else None, silence_s)
    _held = Held(policy, sync, driver)


def close_trainer() -> None:
    global _held
    if _held is not None:
        _held.sync.close()
        if _held.engine is not None:
            _held.engine.close()
    _held = None


def start_servers(config: Any, count: int, logs: Path) -> None:
    """Of an engine, which the sync of this rank 0 then speaks to in place of the driver."""
    from lens_megatron.rollout.sglang_engine import SGLangEngine
    from lens_megatron.rollout.sglang_seat import seats

    if dist.get_rank() == 0:
        assert _held is not None
        _held.engine = _held.sync._servers = SGLangEngine(seats(config, count, "m", logs, 0, {}, 0), config)


def servers() -> list[tuple[str, int]]:
    """With weights: their names, and how often they were started."""
    if _held is None or _held.engine is None:
        return []
    return [(seat.name, seat.starts) for seat in _held.engine._pool.ready()]


def groups() -> list[str]:
    """Names of those that the servers may be in."""
    assert _held is not None
    return [name for transport in _held.sync.transports for name in getattr(transport, "_names", ())]


def train_once(seed: int) -> float:
    """One update that raises the likelihood of some random tokens; the gradient norm."""
    from lens_megatron.mcore.step import train_step

    assert _held is not None
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, 125, (20,), generator=generator) for _ in range(4)]

    def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
        there_T = pack.target_T >= 0
        return -(logprobs_T * there_T).sum() / 76, {}

    return train_step(_held.policy, sequences, loss, tokens_per_microbatch=64).grad_norm


def sync(version: int) -> Any:
    """What `sync` returns, or the message it ends with."""
    assert _held is not None
    try:
        return _held.sync.sync(version)
    except RunError as error:
        return str(error)


def synced_servers() -> list[list[str]]:
    assert _held is not None
    return _held.driver.synced if _held.driver else []


def labels() -> list[str]:
    """What the servers were said to call their weights."""
    assert _held is not None
    return _held.driver.labels if _held.driver else []


def logprobs(sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """The trainer's, of the tokens after the first."""
    assert _held is not None
    scores = _held.policy.score([torch.tensor(s) for s in sequences], 256)
    return [values[1:].tolist() for values in scores.logprobs]


def sync_with(version: int, plant: str, checked: bool) -> Any:
    """`sync` with something wrong planted; unchecked: by the probe alone, without ledger and checksums."""
    import pytest

    from lens_megatron.rollout.weight_sync import buckets, delivery, fleet, ledger
    from lens_megatron.rollout.weight_sync import sync as sync_module

    with pytest.MonkeyPatch.context() as patch:
        if not checked:
            patch.setattr(ledger.Ledger, "problems", lambda *_: [])
            patch.setattr(sync_module.WeightSync, "_check_checksums", lambda *_: None)
        _PLANTS[plant](patch, buckets, delivery, fleet, ledger)
        return sync(version)


def released_labels(version: int, plant: str) -> list[str]:
    """Of a sync with something wrong planted, which succeeds all the same: what the servers' weights were called."""
    import pytest

    from lens_megatron.rollout.weight_sync import fleet

    release = fleet.Fleet.release
    released: list[str] = []

    def note(self: Any, label: str) -> None:
        released.append(label)
        release(self, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet.Fleet, "release", note)
        synced = sync_with(version, plant, checked=True)
    assert not isinstance(synced, str), synced
    return released


_VICTIM = "model.layers.2.self_attn.o_proj.weight"
_last_exported: dict[str, torch.Tensor] = {}


def _plant_stale_buffer(patch: Any, buckets: Any, *_: Any) -> None:
    """A buffer that was not filled again in time: what is sent are other bytes than were exported."""
    fill = buckets.Buffers.fill

    def stale(self: Any, bucket: Any, tensors: Any) -> Any:
        buffer_B = fill(self, bucket, tensors)
        for slot in bucket.slots:
            if slot.name == _VICTIM:
                weight = buckets.view(buffer_B, slot)
                weight.copy_(_one_step_back(weight))
        return buffer_B

    patch.setattr(buckets.Buffers, "fill", stale)


def _one_step_back(weight: torch.Tensor) -> torch.Tensor:
    """What one update at lr 1e-6 does to bf16: a few elements by one unit in the last place."""
    bits = weight.clone().view(torch.int16).flatten()
    bits[::97] += 1
    return bits.view(weight.dtype).view(weight.shape)


def _plant_stale_at_server(patch: Any, buckets: Any, delivery: Any, fleet: Any, ledger: Any) -> None:
    """The server holds an old tensor though every request went well: put there behind the sync's back."""
    from lens_megatron.rollout.weight_sync.tensor import encode

    end = fleet.Fleet.end_session

    def late(self: Any) -> None:
        weight = _last_exported[_VICTIM]
        described = buckets.Described(_VICTIM, weight.dtype, tuple(weight.shape))
        (bucket,) = buckets.plan_buckets([[described]], 2**20)
        stale = _one_step_back(weight)
        payload = encode(bucket, buckets.Buffers([bucket], torch.device("cpu")).fill(bucket, iter([(_VICTIM, stale)])))
        self.each(lambda server: server.update_weights_from_tensor([payload], None, "flattened_bucket"))
        end(self)

    passing = delivery.Noted.passing

    def note(self: Any, tensors: Any, numbers: Any) -> Any:
        for name, tensor in passing(self, tensors, numbers):
            _last_exported[name] = tensor.clone()
            yield name, tensor

    patch.setattr(delivery.Noted, "passing", note)
    patch.setattr(fleet.Fleet, "end_session", late)


def _plant_never_sent(patch: Any, buckets: Any, delivery: Any, *_: Any) -> None:
    """The plan forgets a layer."""
    units = delivery.Delivery.units

    def fewer(self: Any, stage: Any = None) -> Any:
        return [names for names in units(self, stage) if not names[0].startswith("model.layers.3.mlp")]

    patch.setattr(delivery.Delivery, "units", fewer)


def _plant_lost_by_server(patch: Any, buckets: Any, delivery: Any, fleet: Any, ledger: Any) -> None:
    """A bucket that something on the way says it took."""
    from lens_megatron.rollout.sglang_client import SGLangClient

    update = SGLangClient.update_weights_from_tensor
    count = [0]

    async def lossy(self: Any, *arguments: Any, **more: Any) -> None:
        count[0] += 1
        if count[0] != 3:
            await update(self, *arguments, **more)

    patch.setattr(SGLangClient, "update_weights_from_tensor", lossy)


def _plant_not_acknowledged(patch: Any, buckets: Any, delivery: Any, fleet: Any, ledger: Any) -> None:
    """An answer that was not written down, or never came."""
    acknowledge = ledger.Ledger.acknowledge
    patch.setattr(
        ledger.Ledger, "acknowledge", lambda self, server, bucket: bucket == 1 or acknowledge(self, server, bucket)
    )


def _plant_first_probe_differs(patch: Any, buckets: Any, delivery: Any, fleet: Any, ledger: Any) -> None:
    probe, count = fleet.Fleet.probe, [0]

    def wrong_once(self: Any, tokens: Any, label: str, routers: Any) -> Any:
        count[0] += 1
        answers = probe(self, tokens, label, routers)
        if count[0] > 1:
            return answers
        wrong = (1e12,) * (len(tokens) - 1)
        return {url: replace(answer, prompt_logprobs=wrong) for url, answer in answers.items()}

    patch.setattr(fleet.Fleet, "probe", wrong_once)


_PLANTS: dict[str, Any] = {
    "": lambda *_: None,
    "first_probe_differs": _plant_first_probe_differs,
    "stale_buffer": _plant_stale_buffer,
    "stale_at_server": _plant_stale_at_server,
    "bucket_never_sent": _plant_never_sent,
    "bucket_lost_by_server": _plant_lost_by_server,
    "bucket_not_acknowledged": _plant_not_acknowledged,
}


def sync_while(version: int, action: str, targets: Any, at: int = 2) -> tuple[Any, float]:
    """`sync`, and when rank 0 has filled its bucket number `at` something happens to a server; with the seconds it took.

    kill, stop: signals to these processes. close: somebody ends the update session at this address just before bucket
    `at` is asked of it, which is refused (400).
    """
    import os
    import signal
    import time

    import pytest

    from lens_megatron.rollout.weight_sync import buckets

    fill = buckets.Buffers.fill
    count = [0]

    def happens(self: Any, bucket: Any, tensors: Any) -> Any:
        buffer_B = fill(self, bucket, tensors)
        count[0] += 1
        if count[0] == at and dist.get_rank() == 0:
            for pid in targets:
                os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return buffer_B

    with pytest.MonkeyPatch.context() as patch:
        if action == "close":
            _close_before(patch, at, targets.url)
        else:
            patch.setattr(buckets.Buffers, "fill", happens)
        began = time.monotonic()
        return sync(version), time.monotonic() - began


def _close_before(patch: Any, at: int, url: str) -> None:
    from lens_megatron.rollout.sglang_client import SGLangClient

    asked = [0]

    def closing(real: Any) -> Any:
        async def update(self: Any, *arguments: Any, **more: Any) -> None:
            asked[0] += self.url == url
            if asked[0] == at and self.url == url:
                await self.end_weight_update()
            await real(self, *arguments, **more)

        return update

    for name in ("update_weights_from_tensor", "update_weights_from_distributed"):
        patch.setattr(SGLangClient, name, closing(getattr(SGLangClient, name)))
