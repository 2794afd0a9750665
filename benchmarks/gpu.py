"""The whole of what one GPU can show, in one command of under 8 minutes:

    python -m benchmarks.gpu [--json benchmarks/results/gpu_h200.json] [--parts head,step] [--smoke]

Every part is on its own: one that fails is reported, and the others still run. `--smoke` is the same code with tiny shapes,
for a machine without a GPU; its figures mean nothing.

    matmul      the rate of a large bf16 product: what everything else is a share of
    correct     each head against fp64, on this device
    head        time, TFLOP/s and memory: ours, materialised logits, torch.compile over chunks, Liger-Kernel
    step        training tokens/s and model FLOP utilisation, packed and padded
    scoring     prompt scoring tokens/s
    export      weights to the host, against a copy on the device
    checkpoint  seconds to save, and seconds that training waits
    tiles       the two kernels by tile sizes, to choose head_triton's table by
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks._machine import machine
from benchmarks._work import median_seconds, synchronize

if TYPE_CHECKING:  # the head's benchmarks run where Megatron-Core is missing
    from lens_megatron.mcore.settings import HeadKind, Recompute

Row = dict[str, Any]
_DATASHEET_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


@dataclass(frozen=True)
class Size:
    """What is measured; the smoke test's is the same in small."""

    matmul: int = 8192
    hidden: int = 4096
    vocabulary: int = 151_936
    tokens: tuple[int, ...] = (8192, 16_384, 32_768, 65_536)
    tile_tokens: int = 16_384
    correct: tuple[int, int, int] = (300, 512, 5003)  # tokens, hidden, vocabulary
    repeats: int = 5
    models: tuple[str, ...] = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b-base")
    budgets: tuple[int, ...] = (4096, 16_384)
    packs: int = 4  # micro-batches in a step, about
    prompts: int = 512
    prompt_tokens: int = 200
    scoring_model: str = "qwen3-4b-base"
    saved_model: str = "qwen3-0.6b"


SMOKE = Size(
    matmul=64,
    hidden=64,
    vocabulary=515,
    tokens=(24, 40),
    tile_tokens=20,
    correct=(11, 32, 131),
    repeats=1,
    models=("tiny-qwen3-tied",),
    budgets=(64,),
    packs=2,
    prompts=5,
    prompt_tokens=9,
    scoring_model="tiny-qwen3",
    saved_model="tiny-qwen3",
)


class Bench:
    """The size, and the rate that every share is taken of."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.gpu = torch.cuda.is_available()
        self.where = torch.device("cuda" if self.gpu else "cpu")
        self.rate: float | None = None  # FLOP/s
        self._best: HeadKind | None = None

    def share(self, flops: float, seconds: float) -> float | None:
        return round(flops / seconds / self.rate, 3) if self.rate else None

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=self.where, dtype=torch.float32).mul_(scale).to(torch.bfloat16)

    # parts

    def matmul(self) -> list[Row]:
        n = self.size.matmul
        a, b = self.normal(n, n), self.normal(n, n)
        seconds = median_seconds(lambda: a @ b, 4 * self.size.repeats, warm_up=3)
        self.rate = 2 * n**3 / seconds
        return [{"shape": f"{n}^3", "ms": ms(seconds), "tflops": tera(self.rate)}]

    def correct(self) -> list[Row]:
        tokens, hidden, vocabulary = self.size.correct
        rows = []
        for dtype in (torch.bfloat16, torch.float32):
            h = self.normal(tokens, hidden, scale=0.3).to(dtype)
            w = self.normal(vocabulary, hidden, scale=0.3).to(dtype)
            label = torch.randint(0, vocabulary, (tokens,), device=self.where)
            upstream = torch.randn(2, tokens, device=self.where)
            expected = both_passes(materialised_fp64, h.double(), w.double(), label, upstream)
            bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
            for name, head in self.our_heads():

                def errors(
                    head: Any = head, inputs: Any = (h, w, label, upstream), right: Any = expected, bound: float = bound
                ) -> Row:
                    found = both_passes(head, *inputs)
                    each = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
                    names = ("logprob", "entropy", "d_hidden", "d_weight")
                    return {**dict(zip(names, map(short, each), strict=True)), "ok": max(each) < bound}

                rows.append({"head": name, "dtype": str(dtype).removeprefix("torch.")} | guarded(errors))
        return rows

    def our_heads(self) -> list[tuple[str, Callable[..., Any]]]:
        from lens_megatron.mcore.head import token_logprobs_and_entropy, triton_available

        heads: list[tuple[str, Callable[..., Any]]] = []
        if self.gpu and triton_available():
            heads.append(("triton", lambda *a: token_logprobs_and_entropy(*a, kind="triton")))
            heads.append(("triton, pointers", self._with_pointers))
        return [*heads, ("torch, chunked", lambda *a: token_logprobs_and_entropy(*a, kind="torch"))]

    def best_head(self) -> HeadKind:
        """The fused one, if it is right on this device: a step must be measured even where it is not."""
        if self._best is None:
            wanted = {"head": "triton", "dtype": "bfloat16", "ok": True}
            rows = guarded_rows(self.correct) if self.gpu else []
            self._best = "triton" if any(wanted.items() <= row.items() for row in rows) else "torch"
        return self._best

    def _with_pointers(self, *arguments: Any) -> Any:
        """Loads without tensor descriptors: the other path of the kernels."""
        import dataclasses
        from unittest.mock import patch

        from lens_megatron.mcore import head_triton
        from lens_megatron.mcore.head import token_logprobs_and_entropy

        usual = head_triton.tiles_for
        # stays patched for the backward pass, which comes later: see `both_passes`
        patcher = patch.object(
            head_triton, "tiles_for", lambda h, w: dataclasses.replace(usual(h, w), descriptors=False)
        )
        patcher.start()
        _STARTED.append(patcher)
        return token_logprobs_and_entropy(*arguments, kind="triton")

    def head(self) -> list[Row]:
        rows = []
        hidden, vocabulary = self.size.hidden, self.size.vocabulary
        w = self.normal(vocabulary, hidden, scale=0.02).requires_grad_()
        rivals = [*self.our_heads(), *other_heads()]
        for tokens in self.size.tokens:
            h = self.normal(tokens, hidden).requires_grad_()
            label = torch.randint(0, vocabulary, (tokens,), device=self.where)
            upstream = torch.randn(2, tokens, device=self.where)
            for name, head in rivals:
                row: Row = {"tokens": tokens, "head": name}
                rows.append({**row, **guarded(partial(self._time_head, head, h, w, label, upstream))})
        return rows

    def _time_head(self, head: Callable[..., Any], h: Any, w: Any, label: Any, upstream: Any) -> Row:
        flops = 2.0 * h.size(0) * h.size(1) * w.size(0)
        repeats = max(1, min(self.size.repeats, int(2e15 / flops)))

        def forward() -> Any:
            with torch.no_grad():
                result = head(h, w, label)
            stop_patches()
            return result

        both = median_seconds(lambda: both_passes(head, h, w, label, upstream), repeats)
        row: Row = {
            "fwd+bwd ms": ms(both),
            "fwd+bwd tflops": tera(3 * flops / both),
            "share": self.share(3 * flops, both),
        }
        if not getattr(head, "gradients_in_forward", False):
            alone = median_seconds(forward, repeats)
            row.update({"fwd ms": ms(alone), "fwd tflops": tera(flops / alone), "fwd share": self.share(flops, alone)})
        if self.gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = both_passes(head, h, w, label, upstream)
            gradients = (h.numel() + w.numel()) * h.element_size()
            beyond = torch.cuda.max_memory_allocated() - before - gradients
            del kept
            row.update(
                {"beyond MiB": round(beyond / 2**20), "of logits": short(beyond / (4.0 * h.size(0) * w.size(0)))}
            )
        return row

    def tiles(self) -> list[Row]:
        """Each kernel alone, in the shapes that training gives it."""
        if not self.gpu:
            return [{"skipped": "no GPU"}]
        from lens_megatron.mcore import head_triton

        tokens, hidden, vocabulary = self.size.tile_tokens, self.size.hidden, self.size.vocabulary
        h, w = self.normal(tokens, hidden), self.normal(vocabulary, hidden, scale=0.02)
        label = torch.randint(0, vocabulary, (tokens,), device=self.where)
        zeros, ones = torch.zeros(tokens, device=self.where), torch.ones(tokens, device=self.where)
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
                    "fwd share": self.share(flops, first),
                    "grad kernel tflops": tera(flops / second),
                    "grad share": self.share(flops, second),
                }

            shape = f"{tile.tokens}x{tile.rows}x{tile.hidden}"
            loads = "descriptors" if tile.descriptors else "pointers"
            rows.append({"tile": shape, "warps": tile.warps, "stages": tile.stages, "group": tile.group, "loads": loads}
                        | guarded(measured))  # fmt: skip
        return rows

    def step(self) -> list[Row]:
        rows: list[Row] = []
        for name in self.size.models:
            for budget in self.size.budgets:
                for recompute in ("none", "selective", "full"):
                    found = guarded_rows(partial(self._train, name, budget, recompute))
                    free()
                    if any("out of memory" in row for row in found) and recompute != "full":
                        continue  # the next one holds less
                    rows += [{"model": name, "budget": budget, "recompute": recompute, **row} for row in found]
                    break
        return rows

    def _train(self, name: str, budget: int, recompute: Recompute) -> list[Row]:
        from unittest.mock import patch

        from benchmarks._work import math_lengths, random_policy, random_sequences, train_flops
        from lens_megatron.mcore import step
        from lens_megatron.mcore.pipeline import plan_for_this_layout
        from lens_megatron.model_spec import load_model_spec

        spec = load_model_spec(name)
        policy = random_policy(spec, recompute, self.best_head())
        lengths = math_lengths(self.size.packs * budget, budget // 4)
        sequences = random_sequences(lengths, spec.vocab_size)
        flops = train_flops(spec, lengths)

        def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
            return -torch.where(pack.target_T >= 0, logprobs_T, 0.0).sum() / sum(lengths), {}

        def one() -> Any:
            return step.train_step(policy, sequences, loss, tokens_per_microbatch=budget)

        rows: list[Row] = []
        for how in ("packed", "padded"):
            plan = plan_for_this_layout if how == "packed" else _padded
            packs = plan(lengths, budget, policy.config)
            with patch.object(step, "plan_for_this_layout", plan):
                seconds = median_seconds(one, min(3, self.size.repeats))
            row: Row = {
                "head": self.best_head(),
                "how": how,
                "tokens": sum(lengths),
                "with padding": sum(pack.tokens for pack in packs),
                "s": round(seconds, 4),
                "tokens/s": round(sum(lengths) / seconds),
                "share": self.share(flops, seconds),
            }
            sheet = _DATASHEET_BF16.get(torch.cuda.get_device_name()) if self.gpu else None
            if sheet:
                row["mfu"] = round(flops / seconds / sheet, 3)
            rows.append(row)
        rows[0]["packed/padded"] = round(rows[1]["s"] / rows[0]["s"], 3)
        return rows

    def scoring(self) -> list[Row]:
        from benchmarks._work import random_policy, random_sequences
        from lens_megatron.model_spec import load_model_spec

        spec = load_model_spec(self.size.scoring_model)
        policy = random_policy(spec, head=self.best_head())
        prompts = random_sequences([self.size.prompt_tokens] * self.size.prompts, spec.vocab_size)
        budget = max(self.size.budgets)
        seconds = median_seconds(lambda: policy.score(prompts, budget, entropy=False), min(3, self.size.repeats))
        tokens = sum(map(len, prompts))
        row: Row = {"model": self.size.scoring_model, "head": self.best_head(), "prompts": len(prompts)}
        return [{**row, "tokens/s": round(tokens / seconds)}]

    def export(self) -> list[Row]:
        from benchmarks._work import random_policy
        from lens_megatron.model_spec import load_model_spec

        policy = random_policy(load_model_spec(self.size.scoring_model))
        parameters = [p.detach() for chunk in policy.chunks for p in chunk.parameters()]
        held = sum(p.numel() * p.element_size() for p in parameters)

        def export() -> None:
            for _ in policy.export_hf():
                pass

        copies = [torch.empty_like(p) for p in parameters]

        def copy() -> None:
            for target, parameter in zip(copies, parameters, strict=True):
                target.copy_(parameter)

        out, device_copy = median_seconds(export, 2), median_seconds(copy, 5)
        return [
            {
                "model": self.size.scoring_model,
                "GB": round(held / 1e9, 3),
                "export GB/s": round(held / out / 1e9, 2),
                "device copy GB/s": round(held / device_copy / 1e9, 1),
            }
        ]

    def checkpoint(self) -> list[Row]:
        from benchmarks._work import random_policy
        from lens_megatron.checkpoints import CheckpointConfig
        from lens_megatron.mcore.checkpoint_run import Saver
        from lens_megatron.model_spec import load_model_spec

        policy = random_policy(load_model_spec(self.size.saved_model))
        rows = []
        for asynchronous in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                saver = Saver(policy, Path(folder), CheckpointConfig(asynchronous=asynchronous))
                synchronize()
                start = time.perf_counter()
                stall = saver.save(1, {})
                saver.finish()
                seconds = time.perf_counter() - start
                size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            rows.append(
                {
                    "model": self.size.saved_model,
                    "asynchronous": asynchronous,
                    "GB": round(size / 1e9, 3),
                    "s": round(seconds, 2),
                    "stall s": round(stall, 2),
                }
            )
        return rows


def _padded(lengths: Sequence[int], budget: int, config: Any) -> Any:
    from benchmarks._work import padded_packs

    return padded_packs(lengths, budget)


PARTS = ("matmul", "correct", "head", "step", "scoring", "export", "checkpoint", "tiles")
_STARTED: list[Any] = []  # patches that hold until a forward and its backward pass are done


def stop_patches() -> None:
    while _STARTED:
        _STARTED.pop().stop()


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
        Tiles(128, 128, 64, warps=4, stages=4, group=16, descriptors=True),
        Tiles(128, 128, 64, warps=8, stages=4, group=16, descriptors=True),
        Tiles(256, 128, 64, warps=8, stages=3, group=8, descriptors=True),
        Tiles(128, 256, 128, warps=8, stages=2, group=16, descriptors=True),
    ]


def guarded(work: Callable[[], Row]) -> Row:
    """Its row, or why there is none."""
    try:
        return work()
    except torch.OutOfMemoryError:  # a result: what holds all logits cannot hold many
        stop_patches()
        free()
        return {"out of memory": True}
    except Exception as error:
        stop_patches()
        free()
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}


def guarded_rows(work: Callable[[], list[Row]]) -> list[Row]:
    result: list[Row] = []

    def fill() -> Row:
        result.extend(work())
        return {}

    failure = guarded(fill)
    return [*result, failure] if failure else result


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def tera(flops: float) -> float:
    return round(flops / 1e12, 3)


def short(value: float) -> float:
    return float(f"{value:.2e}")


def table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="everything that one GPU can show")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
    parser.add_argument("--limit-s", type=float, default=480.0, help="no part is started later (default 480)")
    parser.add_argument("--json", metavar="F")
    arguments = parser.parse_args(argv)
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not arguments.smoke:
        parser.error("no GPU here; --smoke runs the same code on tiny shapes")
    torch.manual_seed(0)
    bench = Bench(SMOKE if arguments.smoke else Size())
    device = torch.cuda.get_device_name() if bench.gpu else "cpu"
    result: dict[str, Any] = {"device": device, "smoke": arguments.smoke, **machine(), "parts": {}, "seconds": {}}
    began = time.perf_counter()
    for name in parts:
        start = time.perf_counter()
        if start - began > arguments.limit_s:
            rows: list[Row] = [{"skipped": f"{arguments.limit_s:.0f} s were over"}]
        else:
            try:
                rows = getattr(bench, name)()
            except Exception as error:  # one part's failure is a result, too
                traceback.print_exc()
                rows = [{"failed": f"{type(error).__name__}: {error}"}]
        free()
        result["parts"][name] = rows
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        print(f"\n{name} ({result['seconds'][name]} s)\n{table(rows)}", flush=True)
        if arguments.json:  # after every part: a machine that is taken away takes the rest only
            Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    failed = [
        name for name, rows in result["parts"].items() if any("failed" in row or row.get("ok") is False for row in rows)
    ]
    print(f"\n{device}, {time.perf_counter() - began:.0f} s" + (f"; failed in: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
