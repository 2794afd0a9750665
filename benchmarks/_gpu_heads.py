"""The language model's head on a GPU: right, fast, small; ours, its rivals, and its kernels by tile sizes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._gpu_bench import Bench, Row, guarded, guarded_rows, ms, short, stop_patches, tera, until_stopped
from benchmarks._work import median_seconds

if TYPE_CHECKING:  # it runs where Megatron-Core is missing
    from lens_megatron.mcore.settings import HeadKind


def correct(bench: Bench) -> list[Row]:
    tokens, hidden, vocabulary = bench.size.correct
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        h = bench.normal(tokens, hidden, scale=0.3).to(dtype)
        w = bench.normal(vocabulary, hidden, scale=0.3).to(dtype)
        label = torch.randint(0, vocabulary, (tokens,), device=bench.where)
        upstream = torch.randn(2, tokens, device=bench.where)
        expected = both_passes(materialised_fp64, h.double(), w.double(), label, upstream)
        bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for name, head in our_heads(bench):

            def errors(
                head: Any = head, inputs: Any = (h, w, label, upstream), right: Any = expected, bound: float = bound
            ) -> Row:
                found = both_passes(head, *inputs)
                each = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
                names = ("logprob", "entropy", "d_hidden", "d_weight")
                return {**dict(zip(names, map(short, each), strict=True)), "ok": max(each) < bound}

            rows.append({"head": name, "dtype": str(dtype).removeprefix("torch.")} | guarded(errors))
    return rows


def our_heads(bench: Bench) -> list[tuple[str, Callable[..., Any]]]:
    from lens_megatron.mcore.head import token_logprobs_and_entropy, triton_available

    heads: list[tuple[str, Callable[..., Any]]] = []
    if bench.gpu and triton_available():
        heads.append(("triton", lambda *a: token_logprobs_and_entropy(*a, kind="triton")))
        heads.append(("triton, pointers", _with_pointers))
    return [*heads, ("torch, chunked", lambda *a: token_logprobs_and_entropy(*a, kind="torch"))]


def best_head(bench: Bench) -> HeadKind:
    """The fused one, if it is right on this device: a step must be measured even where it is not."""
    if bench.best_head is None:
        wanted = {"head": "triton", "dtype": "bfloat16", "ok": True}
        rows = guarded_rows(partial(correct, bench)) if bench.gpu else []
        bench.best_head = "triton" if any(wanted.items() <= row.items() for row in rows) else "torch"
    return bench.best_head


def _with_pointers(*arguments: Any) -> Any:
    """Loads without tensor descriptors: the other path of the kernels."""
    import dataclasses
    from unittest.mock import patch

    from lens_megatron.mcore import head_triton
    from lens_megatron.mcore.head import token_logprobs_and_entropy

    usual = head_triton.tiles_for
    # for the backward pass too, which comes later: see `both_passes`
    until_stopped(
        patch.object(head_triton, "tiles_for", lambda h, w: dataclasses.replace(usual(h, w), descriptors=False))
    )
    return token_logprobs_and_entropy(*arguments, kind="triton")


def head(bench: Bench) -> list[Row]:
    rows = []
    hidden, vocabulary = bench.size.hidden, bench.size.vocabulary
    w = bench.normal(vocabulary, hidden, scale=0.02).requires_grad_()
    rivals = [*our_heads(bench), *other_heads()]
    for tokens in bench.size.tokens:
        h = bench.normal(tokens, hidden).requires_grad_()
        label = torch.randint(0, vocabulary, (tokens,), device=bench.where)
        upstream = torch.randn(2, tokens, device=bench.where)
        for name, head in rivals:
            row: Row = {"tokens": tokens, "head": name}
            rows.append({**row, **guarded(partial(_time_head, bench, head, h, w, label, upstream))})
    return rows


def _time_head(bench: Bench, head: Callable[..., Any], h: Any, w: Any, label: Any, upstream: Any) -> Row:
    flops = 2.0 * h.size(0) * h.size(1) * w.size(0)
    repeats = max(1, min(bench.size.repeats, int(2e15 / flops)))

    def forward() -> Any:
        with torch.no_grad():
            result = head(h, w, label)
        stop_patches()
        return result

    both = median_seconds(lambda: both_passes(head, h, w, label, upstream), repeats)
    row: Row = {
        "fwd+bwd ms": ms(both),
        "fwd+bwd tflops": tera(3 * flops / both),
        "share": bench.share(3 * flops, both),
    }
    if not getattr(head, "gradients_in_forward", False):
        alone = median_seconds(forward, repeats)
        row.update({"fwd ms": ms(alone), "fwd tflops": tera(flops / alone), "fwd share": bench.share(flops, alone)})
    if bench.gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = both_passes(head, h, w, label, upstream)
        gradients = (h.numel() + w.numel()) * h.element_size()
        beyond = torch.cuda.max_memory_allocated() - before - gradients
        del kept
        row.update({"beyond MiB": round(beyond / 2**20), "of logits": short(beyond / (4.0 * h.size(0) * w.size(0)))})
    return row


def tiles(bench: Bench) -> list[Row]:
    """Each kernel alone, in the shapes that training gives it."""
    if not bench.gpu:
        return [{"skipped": "no GPU"}]
    from lens_megatron.mcore import head_triton

    tokens, hidden, vocabulary = bench.size.tile_tokens, bench.size.hidden, bench.size.vocabulary
    h, w = bench.normal(tokens, hidden), bench.normal(vocabulary, hidden, scale=0.02)
    label = torch.randint(0, vocabulary, (tokens,), device=bench.where)
    zeros, ones = torch.zeros(tokens, device=bench.where), torch.ones(tokens, device=bench.where)
    flops = 2.0 * tokens * hidden * vocabulary
    rows = []
    for tile in tile_candidates():

        def forward(tile: Any = tile) -> Any:
            return head_triton.statistics(h, w, label, 1.0, True, tiles=tile)

        def logits_gradient(tile: Any = tile) -> Any:  # neither product: the kernel alone
            return head_triton.gradients(h, w, label, ones * 12, ones, ones, zeros, 1.0, None, None, tiles=tile)

        def measured(one: Any = forward, two: Any = logits_gradient) -> Row:
            first, second = median_seconds(one, 3), median_seconds(two, 3)
            return {
                "fwd tflops": tera(flops / first),
                "fwd share": bench.share(flops, first),
                "grad kernel tflops": tera(flops / second),
                "grad share": bench.share(flops, second),
            }

        shape = f"{tile.tokens}x{tile.rows}x{tile.hidden}"
        loads = "descriptors" if tile.descriptors else "pointers"
        rows.append({"tile": shape, "warps": tile.warps, "stages": tile.stages, "group": tile.group, "loads": loads}
                    | guarded(measured))  # fmt: skip
    return rows


def both_passes(head: Callable[..., Any], h: Any, w: Any, label: Any, upstream: Any) -> list[torch.Tensor]:
    """log-probs, entropies (where the head gives them) and both gradients."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    results = head(h, w, label)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((result.double() * up).sum() for result, up in zip(results, upstream, strict=False) if result.dim())
    if results[0].dim() == 0:  # a mean loss
        loss = results[0]
    gradients = torch.autograd.grad(loss, (h, w))
    stop_patches()
    return [x.detach() for x in (*results, *gradients)]


def materialised(h: Any, w: Any, label: Any) -> Any:
    logp = (h @ w.t()).float().log_softmax(-1)
    return logp.gather(1, label[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def materialised_fp64(h: Any, w: Any, label: Any) -> Any:
    logp = (h @ w.t()).log_softmax(-1)
    return logp.gather(1, label[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def other_heads() -> list[tuple[str, Callable[..., Any]]]:
    """Rivals give log-probs, or a mean cross-entropy; none gives entropies but the first."""
    heads: list[tuple[str, Callable[..., Any]]] = [("materialised", materialised)]

    def chunked(h: Any, w: Any, label: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        parts = [
            checkpoint(_compiled(), one, w, where, use_reentrant=False)
            for one, where in zip(h.split(2048), label.split(2048), strict=True)
        ]
        return torch.cat(parts)

    heads.append(("torch.compile, chunked", chunked))
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return heads

    def liger(h: Any, w: Any, label: Any) -> Any:
        return LigerFusedLinearCrossEntropyLoss()(w, h, label)

    liger.gradients_in_forward = True  # type: ignore[attr-defined]
    return [*heads, ("Liger-Kernel", liger)]


def _cross_entropy(h: Any, w: Any, label: Any) -> Any:
    return -torch.nn.functional.cross_entropy((h @ w.t()).float(), label, reduction="none")


_COMPILED: list[Any] = []


def _compiled() -> Any:
    if not _COMPILED:
        # compiling on a CPU needs a C++ compiler and says nothing
        _COMPILED.append(torch.compile(_cross_entropy) if torch.cuda.is_available() else _cross_entropy)
    return _COMPILED[0]


def tile_candidates() -> list[Any]:
    from lens_megatron.mcore.head_triton import Tiles

    return [
        Tiles(128, 256, 64, warps=8, stages=stages, group=group, descriptors=descriptors)
        for descriptors in (True, False)
        for stages in (3, 4)
        for group in (8, 16)
    ] + [
        # small enough for two blocks a processor: one's last kernel part beside the other's products
        Tiles(128, 128, 64, warps=8, stages=3, group=16, descriptors=True),
        Tiles(128, 128, 64, warps=4, stages=3, group=16, descriptors=True),
        Tiles(128, 128, 64, warps=4, stages=4, group=16, descriptors=True),
        Tiles(128, 128, 64, warps=8, stages=4, group=16, descriptors=True),
        Tiles(256, 128, 64, warps=8, stages=3, group=8, descriptors=True),
        Tiles(128, 256, 128, warps=8, stages=2, group=16, descriptors=True),
    ]
