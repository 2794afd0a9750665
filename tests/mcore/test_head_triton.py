"""The fused head against a softmax over the whole vocabulary in fp64: in Triton's interpreter, or on a GPU where one is.

The interpreter shows that the arithmetic and the indices are right; what the compiler makes of them it cannot show.
`pytest -m gpu tests/mcore/test_head_triton.py` runs the same cases compiled, with the tiles that training uses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lens_megatron.mcore.head import choose_walk, token_logprobs_and_entropy
from tests.mcore.test_head import Ranks, assert_close, inputs, slow, with_gradients

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
WHERE = "cuda" if ON_GPU else "cpu"
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(scope="module")
def fused() -> Iterator[Any]:
    """head_triton, its kernels interpreted unless there is a GPU (tests/conftest.py sees to that)."""
    from lens_megatron.mcore import head_triton

    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            _mend_the_interpreter(patch)
        assert head_triton.interpreted() != ON_GPU
        yield head_triton


def _mend_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """triton 3.6 calls int() on an array of one number, which numpy 2.4 refuses, and multiplies bf16's bits as integers."""
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def from_bits(x: Any) -> Any:
        if x.data.dtype != np.uint16:  # what it keeps bf16 in
            return x
        fp32 = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(fp32, interpreter.tl.float32)

    patch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
    patch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, from_bits(a), from_bits(b), *rest),
    )


def head(labels: Tensor, **options: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs_and_entropy(hidden, weight, labels.to(hidden.device), kind="triton", **options)

    return function


def found_and_expected(
    tokens: int, vocabulary: int, size: int, dtype: Any, temperature: float, padding: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    hidden, weight, labels, upstream = inputs(tokens, vocabulary, size, dtype)
    labels[0], labels[-1] = 0, vocabulary - 1
    expected = with_gradients(lambda h, w: slow(h, w, labels, temperature), hidden.double(), weight.double(), upstream)
    padded = torch.cat([weight, torch.full((padding, size), 100.0, dtype=dtype)])
    function = head(labels, temperature=temperature, vocab_size=vocabulary)
    found = with_gradients(function, hidden.to(WHERE), padded.to(WHERE), upstream.to(WHERE))
    found = [x.cpu() for x in found]
    assert not found[3][vocabulary:].any()
    return [*found[:3], found[3][:vocabulary]], expected


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
# a tile of the interpreter's is 16 tokens x 32 rows x 16 deep; of the GPU's up to 128 x 256 x 64
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "size", "padding"), [(1, 2, 16, 0), (19, 131, 24, 13), (48, 64, 16, 0), (33, 97, 40, 31)]
)
def test_values_and_gradients(
    fused: Any, dtype: Any, relative: float, temperature: float, tokens: int, vocabulary: int, size: int, padding: int
) -> None:
    assert_close(*found_and_expected(tokens, vocabulary, size, dtype, temperature, padding), relative)


@pytest.mark.parametrize("descriptors", [False, True])
def test_both_ways_of_loading(fused: Any, descriptors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if descriptors and ON_GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need Hopper")
    usual = fused.tiles_for(torch.empty(1, 64, dtype=torch.bfloat16, device=WHERE), torch.empty(1, 64, device=WHERE))
    tiles = dataclasses.replace(usual, descriptors=descriptors)
    monkeypatch.setattr(fused, "tiles_for", lambda hidden, weight: tiles)
    assert_close(*found_and_expected(35, 107, 32, torch.bfloat16, 0.7, padding=5), 1e-2)


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
def test_many_chunks(fused: Any, dtype: Any, relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """d weight is summed over chunks of tokens, d hidden over chunks of the vocabulary."""
    monkeypatch.setattr(fused, "chunk_sizes", lambda *_: (16, 32))
    assert_close(*found_and_expected(70, 150, 16, dtype, 1.3, padding=3), relative)


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(80, 149), (64, 64)])
def test_vocabulary_cut_over_two_ranks(
    fused: Any, dtype: Any, relative: float, rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end within a tile, labels of the other rank beside it; a rank with nothing but padding."""
    hidden, weight, labels, upstream = inputs(21, vocabulary, 16, dtype)
    labels[:4] = torch.tensor([0, min(rows, vocabulary) - 1, min(rows, vocabulary - 1), vocabulary - 1])
    expected = with_gradients(lambda h, w: slow(h, w, labels, 0.8), hidden.double(), weight.double(), upstream)
    padded = torch.cat([weight, torch.full((2 * rows - vocabulary, 16), 9.0, dtype=dtype)]).to(WHERE)
    group = Ranks(2)
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
    # the interpreter keeps the program's number in one place: the ranks' kernels take turns
    turns = functools.partial(_one_at_a_time, lock=threading.Lock())
    for name in ("statistics", "gradients"):
        monkeypatch.setattr(fused, name, turns(getattr(fused, name)))

    def on_rank(rank: int) -> list[Tensor]:
        options = {"vocab_start": rank * rows, "vocab_size": vocabulary, "group": group, "temperature": 0.8}
        part = padded[rank * rows : (rank + 1) * rows]
        return [x.cpu() for x in with_gradients(head(labels, **options), hidden.to(WHERE), part, upstream.to(WHERE))]

    results = group.run(on_rank)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    d_weight = torch.cat([result[3] for result in results])
    assert not d_weight[vocabulary:].any()
    assert_close([*results[0][:2], results[0][2] + results[1][2], d_weight[:vocabulary]], expected, relative)


def _one_at_a_time(function: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    def turn(*arguments: Any, **options: Any) -> Any:
        with lock:
            return function(*arguments, **options)

    return turn


def test_without_entropy(fused: Any) -> None:
    """Scoring: the same log-probs to the bit, and NaN where nothing was computed."""
    hidden, weight, labels, _ = (x.to(WHERE) for x in inputs(20, 75, 16))
    both = token_logprobs_and_entropy(hidden, weight, labels, kind="triton")
    alone = token_logprobs_and_entropy(hidden, weight, labels, kind="triton", entropy=False)
    assert torch.equal(both[0], alone[0]) and bool(alone[1].isnan().all()) and not both[1].isnan().any()


def test_same_bits_every_time(fused: Any) -> None:
    first, second = (found_and_expected(40, 90, 16, torch.bfloat16, 1.0)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_and_numbers_that_are_none(fused: Any) -> None:
    """A winner that takes all; and a NaN stays with its token, and is not lost."""
    hidden, weight, labels, _ = inputs(6, 70, 16)
    hidden[:, 0], weight[:, 0] = 1.0, 3e4
    weight[17, 0] += 200.0
    hidden[3, 5] = torch.nan
    logprobs, entropy = token_logprobs_and_entropy(*(x.to(WHERE) for x in (hidden, weight, labels)), kind="triton")
    expected = slow(hidden, weight, labels, 1.0)
    torch.testing.assert_close(logprobs.cpu().double(), expected[0], rtol=1e-4, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(entropy.cpu().double(), expected[1], rtol=1e-4, atol=1e-2, equal_nan=True)
    assert logprobs.isnan().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("tokens", [1, 500, 4096, 8192, 16_384, 65_536])
@pytest.mark.parametrize(("rows", "hidden"), [(151_936, 4096), (151_936, 1024), (37_984, 4096), (256, 8192)])
def test_chunks_fit_the_scratch_memory(fused: Any, tokens: int, rows: int, hidden: int) -> None:
    scratch, tiles = fused._SCRATCH, fused._HOPPER
    token_chunk, row_chunk = fused.chunk_sizes(tokens, rows, hidden, 2, tiles, scratch)
    assert token_chunk % tiles.tokens == 0 and row_chunk % tiles.rows == 0
    assert 4 * hidden * token_chunk + 2 * token_chunk * row_chunk <= scratch
    assert row_chunk >= min(rows, fused._LEAST_CHUNK)
    assert -(-tokens // token_chunk) <= 10 * max(1, hidden // 4096)  # roundings of d weight
    if (tokens, rows, hidden) == (65_536, 151_936, 4096):
        vectors = 64 * tokens  # labels, scales, statistics and their temporaries
        assert scratch + vectors < 0.005 * tokens * rows * 4


@pytest.mark.parametrize("tokens", [100, 2000, 8192, 16_384, 65_536])
def test_splits_keep_the_processors_busy(fused: Any, tokens: int) -> None:
    blocks, tiles, processors = -(-tokens // 128), -(-151_936 // 256), 132
    splits, each = fused.choose_splits(blocks, tiles, processors, group=16)
    assert (splits - 1) * each < tiles <= splits * each  # no split is empty, none is missing
    work, capacity = blocks * tiles, -(-blocks * splits // processors) * processors * each
    assert work / capacity > (0.8 if tokens < 128 else 0.93)
    assert 4 * 4 * splits < 0.004 * 4 * 151_936  # bytes a token: the partial results


def test_what_walks_the_vocabulary(fused: Any) -> None:
    from lens_megatron.mcore import head_chunked

    cpu = torch.zeros(1, 2)
    assert choose_walk("torch", cpu) is head_chunked
    with pytest.raises(RuntimeError, match=r"memory\.head"):
        choose_walk("triton", cpu.double())
    if ON_GPU:
        assert choose_walk("triton", cpu.cuda()) is fused
        with pytest.raises(RuntimeError, match=r"memory\.head"):
            choose_walk("triton", cpu)
