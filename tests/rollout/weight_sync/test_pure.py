"""Buckets and the ledger, without any server."""

from __future__ import annotations

import hashlib
import math
import pickle
from base64 import b64decode

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.rollout.weight_sync.buckets import Buffers, Described, plan_buckets, view
from lens_megatron.rollout.weight_sync.checksums import ExpectedChecksums
from lens_megatron.rollout.weight_sync.config import SyncConfig
from lens_megatron.rollout.weight_sync.ledger import Entry, Ledger
from lens_megatron.rollout.weight_sync.tensor import encode, encode_place

CPU = torch.device("cpu")
sizes = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16])), max_size=12)


@settings(max_examples=60, deadline=None)
@given(stages=st.lists(sizes, min_size=1, max_size=3), most=st.integers(1, 200))
def test_plan(stages: list[list[tuple[int, torch.dtype]]], most: int) -> None:
    described = [
        [Described(f"{s}.{i}", dtype, (count,)) for i, (count, dtype) in enumerate(stage)]
        for s, stage in enumerate(stages)
    ]
    buckets = plan_buckets(described, most)
    assert [bucket.number for bucket in buckets] == list(range(len(buckets)))
    for s, stage in enumerate(described):
        mine = [slot for bucket in buckets if bucket.stage == s for slot in bucket.slots]
        assert [slot.name for slot in mine] == [tensor.name for tensor in stage]  # all, once, in order
    largest = max((tensor.bytes for stage in described for tensor in stage), default=0)
    for bucket in buckets:
        assert bucket.bytes <= max(most, largest)
        position = 0
        for slot in bucket.slots:  # SGLang reads them back without gaps, each aligned to its dtype
            assert slot.start == position
            assert slot.start % slot.dtype.itemsize == 0
            position = slot.stop
    # stages take turns: none is two buckets ahead of another that still has some
    for place, bucket in enumerate(buckets):
        for other in range(len(described)):
            sent = sum(b.stage == other for b in buckets[:place])
            whole = sum(b.stage == other for b in buckets)
            assert sent == whole or sent >= sum(b.stage == bucket.stage for b in buckets[:place]) - 1


def test_two_buffers_hold_what_was_put_in() -> None:
    tensors = [(f"w{i}", torch.randn(7, 3)) for i in range(6)]
    described = [Described(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]
    buckets = plan_buckets([described], 2 * 84)
    buffers = Buffers(buckets, CPU)
    incoming = iter(tensors)
    first, second = buffers.fill(buckets[0], incoming), buffers.fill(buckets[1], incoming)
    for bucket, buffer_B in ((buckets[0], first), (buckets[1], second)):
        for slot in bucket.slots:
            assert torch.equal(view(buffer_B, slot), dict(tensors)[slot.name])
    assert buffers.fill(buckets[2], incoming).data_ptr() == first.data_ptr()  # no third buffer


def _ledger(**changes: object) -> Ledger:
    ledger = Ledger(3, "tensor", {"a": (2,), "b": (3,), "c": (4,)})
    ledger.add([Entry(n, k, "float32", (k + 2,), 4 * k + 8, f"f{n}", f"f{n}") for k, n in enumerate("abc")])
    for bucket in range(3):
        ledger.acknowledge("one", bucket)
    return ledger


def test_a_whole_ledger_has_no_problems() -> None:
    assert _ledger().problems(["one"]) == []


def test_what_a_ledger_catches() -> None:
    dropped = _ledger()
    del dropped.entries["b"]
    assert "1 of 3 weights were never sent: b" in "".join(dropped.problems())
    stale = _ledger()
    stale.sent({"b": "other"})
    assert "what was sent is not what left the model: b" in "".join(stale.problems())
    unread = _ledger()
    unread.sent({"c": ""})
    assert "never sent: c" in "".join(unread.problems())
    assert "did not take buckets [0, 1, 2]" in "".join(_ledger().problems(["two"]))
    twice = _ledger()
    twice.acknowledge("one", 1)
    assert "took buckets [0, 1, 1, 2]" in "".join(twice.problems(["one"]))
    with pytest.raises(AssertionError, match="a was sent twice"):
        _ledger().add([Entry("a", 0, "float32", (2,), 8, "fa")])
    shape = _ledger()
    shape.expected = {"a": (2,), "b": (9,), "c": (4,)}
    assert "another shape than the model's were sent: b" in "".join(shape.problems())


def test_equal_weights_have_equal_digests() -> None:
    other = _ledger()
    other.version = 9
    assert other.digest == _ledger().digest
    del other.entries["a"]
    assert other.digest != _ledger().digest


def test_payload_is_the_bucket_and_no_more() -> None:
    tensors = [("a", torch.randn(3, 2)), ("b", torch.randn(5))]
    buckets = plan_buckets([[Described(n, t.dtype, tuple(t.shape)) for n, t in tensors]], 1000)
    large = Buffers([*buckets], CPU)
    large._size = 100_000  # a buffer that had to hold a larger bucket before
    payload = encode(buckets[0], large.fill(buckets[0], iter(tensors)))
    assert len(payload) < 4000
    tree = pickle.loads(b64decode(payload))
    for meta, (name, tensor) in zip(tree["metadata"], tensors, strict=True):
        part = tree["flattened_tensor"][meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
        assert meta.name == name
        assert torch.equal(part, tensor)


def test_payload_by_its_place_is_small_and_the_buffer_itself() -> None:
    tensors = [("a", torch.randn(300, 200)), ("b", torch.randn(500))]
    (bucket,) = plan_buckets([[Described(n, t.dtype, tuple(t.shape)) for n, t in tensors]], 10**6)
    kept: list[torch.Tensor] = []
    payloads = []
    for factor in (1.0, 2.0):  # the second sync's
        buffer_B = Buffers([bucket], CPU, kept).fill(bucket, iter([(n, factor * t) for n, t in tensors]))
        payloads.append(encode_place(bucket, buffer_B))
    assert len(kept) == 1 and kept[0].is_shared() and max(map(len, payloads)) < 2000
    for payload in payloads:  # the same memory, which has the second's weights by now
        tree = pickle.loads(b64decode(payload))
        for meta, (_, tensor) in zip(tree["metadata"], tensors, strict=True):
            part = tree["flattened_tensor"][meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
            assert torch.equal(part, 2.0 * tensor)
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


def test_checksums_of_the_engines_fused_tensors() -> None:
    """By hand: the engine's tensors put together, and SHA-256 of their bytes."""
    q, k, v = torch.randn(8, 4), torch.randn(4, 4), torch.randn(4, 4)
    experts = {(e, x): torch.randn(6, 4) for e in range(2) for x in ("gate", "up", "down")}
    embedding = torch.randn(70, 4)
    expected = ExpectedChecksums()
    prefix = "model.layers.0."
    expected.feed("model.embed_tokens.weight", embedding)
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        expected.feed(f"{prefix}self_attn.{name}_proj.weight", tensor)
    for (e, x), tensor in experts.items():
        expected.feed(f"{prefix}mlp.experts.{e}.{x}_proj.weight", tensor)

    def by_hand(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()[:8].hex()

    w13 = torch.stack([torch.cat([experts[e, "gate"], experts[e, "up"]]) for e in range(2)])
    reported = {
        "model.embed_tokens.weight": by_hand(torch.cat([embedding, torch.zeros(math.ceil(70 / 64) * 64 - 70, 4)])),
        f"{prefix}self_attn.qkv_proj.weight": by_hand(torch.cat([q, k, v])),
        f"{prefix}mlp.experts.w13_weight": by_hand(w13),
        f"{prefix}mlp.experts.w2_weight": by_hand(torch.stack([experts[e, "down"] for e in range(2)])),
    }
    reported["lm_head.weight"] = reported["model.embed_tokens.weight"]
    assert expected.differences(reported, tied=True) == []
    assert expected.differences({**reported, "lm_head.weight": "0" * 16}, tied=True) == ["lm_head.weight"]
    del reported[f"{prefix}mlp.experts.w2_weight"]
    assert expected.differences(reported, tied=True) == [f"{prefix}mlp.experts.w2_weight"]


@pytest.mark.parametrize("wrong", [{"bucket_mib": 0}, {"timeout_s": 0}, {"probe_tokens": 1}, {"probe_tolerance": -1.0}])
def test_config_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyncConfig(**wrong)  # type: ignore[arg-type]
