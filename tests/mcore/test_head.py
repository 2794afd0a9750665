"""The head against a softmax over the whole vocabulary in fp64: values, and both gradients."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lens_megatron.mcore import head_chunked
from lens_megatron.mcore.head import token_logprobs_and_entropy


def slow(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[tokens, vocabulary] in fp64, by autograd."""
    logp = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    return logp.gather(1, labels[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def inputs(tokens: int, vocabulary: int, size: int = 12, dtype: Any = torch.float32, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, size, generator=generator).mul(0.7).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(2, tokens, generator=generator)
    return hidden, weight, labels, upstream


def with_gradients(
    function: Callable[[Tensor, Tensor], tuple], hidden: Tensor, weight: Tensor, upstream: Tensor
) -> list:
    """Both results and the gradients of both inputs, in fp64."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logprobs, entropy = function(hidden, weight)
    gradients = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), (hidden, weight))
    return [x.detach().double() for x in (logprobs, entropy, *gradients)]


def assert_close(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for name, mine, theirs in zip(("logprobs", "entropy", "d hidden", "d weight"), found, expected, strict=True):
        assert mine.shape == theirs.shape, name
        if theirs.numel():
            error = float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3))
            assert error < relative, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (7, 131), (33, 255), (5, 256), (5, 257), (19, 1031)])
def test_values_and_gradients(dtype: Any, relative: float, temperature: float, tokens: int, vocabulary: int) -> None:
    hidden, weight, labels, upstream = inputs(tokens, vocabulary, dtype=dtype)
    expected = with_gradients(lambda h, w: slow(h, w, labels, temperature), hidden.double(), weight.double(), upstream)
    found = with_gradients(
        lambda h, w: token_logprobs_and_entropy(h, w, labels, temperature=temperature), hidden, weight, upstream
    )
    if vocabulary == 1:  # one word: everything is certain, and zero
        assert all(float(x.abs().max()) < 1e-6 for x in found)
    else:
        assert_close(found, expected, relative)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 400),
    padding=st.integers(0, 50),
    tile=st.integers(1, 97),
    temperature=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_any_size_tile_and_padding(
    tokens: int, vocabulary: int, padding: int, tile: int, temperature: float, seed: int
) -> None:
    """Padding rows, whatever they hold, have no probability and no gradient; tiles of any width change nothing."""
    hidden, weight, labels, upstream = inputs(tokens, vocabulary, dtype=torch.float64, seed=seed)
    expected = with_gradients(lambda h, w: slow(h, w, labels, temperature), hidden.double(), weight.double(), upstream)
    padded = torch.cat([weight, torch.full((padding, weight.size(1)), 100.0, dtype=torch.float64)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_chunked, "_TILE_LEAST", tile)
        found = with_gradients(
            lambda h, w: token_logprobs_and_entropy(h, w, labels, temperature=temperature, vocab_size=vocabulary),
            hidden,
            padded,
            upstream,
        )
    assert not found[3][vocabulary:].any()
    assert_close([*found[:3], found[3][:vocabulary]], expected, 1e-9)


@pytest.mark.parametrize("label", [0, 255, 256, 257, 511, 512, 599])
def test_labels_at_the_edges_of_tiles(label: int) -> None:
    hidden, weight, _, upstream = inputs(3, 600)
    assert head_chunked._tiles(600)[1][0] == 256
    labels = torch.full((3,), label)
    expected = with_gradients(lambda h, w: slow(h, w, labels, 1.0), hidden.double(), weight.double(), upstream)
    assert_close(
        with_gradients(lambda h, w: token_logprobs_and_entropy(h, w, labels), hidden, weight, upstream), expected, 1e-5
    )


class Ranks:
    """Stands in for a process group: every thread is a rank, and `all_reduce` meets the others at a barrier."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.parts: dict[int, Tensor] = {}

    def size(self) -> int:
        return self.count

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.parts[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        stacked = torch.stack(list(self.parts.values()))
        self.barrier.wait()
        tensor.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))
        self.parts.clear()
        self.barrier.wait()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def work(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@pytest.mark.parametrize(("ranks", "rows", "vocabulary"), [(2, 192, 301), (4, 128, 385), (4, 128, 300), (3, 64, 65)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_vocabulary_cut_over_ranks(
    ranks: int, rows: int, vocabulary: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's rows, its offset and its part of d hidden; a rank may hold nothing but padding."""
    hidden, weight, labels, upstream = inputs(23, vocabulary)
    labels[:2] = torch.tensor([0, vocabulary - 1])
    expected = with_gradients(lambda h, w: slow(h, w, labels, temperature), hidden.double(), weight.double(), upstream)
    padded = torch.cat([weight, torch.full((ranks * rows - vocabulary, weight.size(1)), 9.0)])
    group = Ranks(ranks)
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)

    def on_rank(rank: int) -> list[Tensor]:
        return with_gradients(
            lambda h, w: token_logprobs_and_entropy(
                h,
                w,
                labels,
                temperature=temperature,
                vocab_start=rank * rows,
                vocab_size=vocabulary,
                group=group,  # type: ignore[arg-type]
            ),
            hidden,
            padded[rank * rows : (rank + 1) * rows],
            upstream,
        )

    results = group.run(on_rank)
    for logprobs, entropy, _, _ in results[1:]:
        assert torch.equal(logprobs, results[0][0])
        assert torch.equal(entropy, results[0][1])
    d_hidden = sum(result[2] for result in results)
    d_weight = torch.cat([result[3] for result in results])
    assert not d_weight[vocabulary:].any()
    assert_close([*results[0][:2], d_hidden, d_weight[:vocabulary]], expected, 1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient_and_cost_none(frozen: str) -> None:
    hidden, weight, labels, upstream = inputs(9, 140)
    expected = with_gradients(lambda h, w: slow(h, w, labels, 1.0), hidden.double(), weight.double(), upstream)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels)
    (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")
    learnt, wanted = (weight.grad, expected[3]) if frozen == "hidden" else (hidden.grad, expected[2])
    torch.testing.assert_close(learnt.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_one_of_the_two_results_alone(used: str) -> None:
    """The unused one arrives in backward as zeros."""
    hidden, weight, labels, upstream = inputs(9, 300)
    upstream[1 if used == "logprobs" else 0] = 0
    expected = with_gradients(lambda h, w: slow(h, w, labels, 0.8), hidden.double(), weight.double(), upstream)
    hidden.requires_grad_()
    weight.requires_grad_()
    result = token_logprobs_and_entropy(hidden, weight, labels, temperature=0.8)[0 if used == "logprobs" else 1]
    (result * upstream[0 if used == "logprobs" else 1]).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), expected[3], rtol=1e-5, atol=1e-5)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences, over several tiles."""
    monkeypatch.setattr(head_chunked, "_TILE_LEAST", 4)
    hidden, weight, labels, _ = inputs(5, 11, size=3, dtype=torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs_and_entropy(h, w, labels % 9, temperature=0.7, vocab_size=9), (hidden, weight)
    )


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_large_logits_do_not_overflow(shift: float) -> None:
    """All of one sign and far from 0, and a winner that takes all."""
    hidden, weight, labels, upstream = inputs(6, 300)
    hidden = torch.cat([hidden, torch.ones(6, 1)], dim=1)
    weight = torch.cat([weight, torch.full((300, 1), shift)], dim=1)
    weight[17, -1] += 200.0  # the last of the vocabulary's first tile wins
    found = with_gradients(lambda h, w: token_logprobs_and_entropy(h, w, labels), hidden, weight, upstream)
    assert all(bool(x.isfinite().all()) for x in found)
    expected = slow(hidden, weight, labels, 1.0)
    # fp32 holds logits of 3e4 to 2e-3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-2)


def test_uniform_distribution() -> None:
    logprobs, entropy = token_logprobs_and_entropy(torch.zeros(4, 8), torch.randn(1000, 8), torch.arange(4))
    torch.testing.assert_close(logprobs, torch.full((4,), -math.log(1000)))
    torch.testing.assert_close(entropy, torch.full((4,), math.log(1000)))


def test_no_tensor_of_tokens_by_vocabulary_is_built() -> None:
    """Every tensor made on the way is far smaller than [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest[0] = max(largest[0], result.numel())
            return result

    tokens, vocabulary = 512, 25_600
    hidden, weight, labels, upstream = inputs(tokens, vocabulary, size=4)
    with Watch():
        with_gradients(lambda h, w: token_logprobs_and_entropy(h, w, labels), hidden, weight, upstream)
    assert tokens * 200 < largest[0] < tokens * vocabulary // 50
