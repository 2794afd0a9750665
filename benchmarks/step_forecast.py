"""What a training step asks of a GPU, counted without one: kernels, bytes, FLOPs, memory held, waits of the host.

    python -m benchmarks.step_forecast [--model qwen3-4b-base,...] [--tokens 4096,16384] [--recompute none,light]
                                       [--tp 2 --world 2] [--gpu h200] [--json benchmarks/results/step_forecast_h200.json]

The real step of the real model runs on a device that holds no data (benchmarks/fake_cuda). Counts are exact; seconds are
arithmetic over rates that are assumed (lens_megatron/planning/gpus.py): a FORECAST, nothing of it was measured. Exchange
between ranks takes no time here.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.fake_cuda import device

_LAUNCH = 3e-6  # seconds a kernel takes at least


@dataclass(frozen=True)
class Line:
    kernel: str
    launches: int
    gigabytes: float
    teraflops: float
    ms: float


@dataclass(frozen=True)
class Forecast:
    model: str
    layout: str
    recompute: str
    tokens: int  # trained, of all data-parallel ranks
    pack_tokens: list[int]  # of this rank
    state_gib: float  # weights, gradients, optimizer
    peak_gib: float
    activations_gib: float
    ms: float
    mfu: float  # of the data sheet's rate, over all ranks
    waits: dict[str, int]
    lines: list[Line]


def forecast(
    model: str,
    *,
    tokens: int = 16_384,
    packs: int = 2,
    layers: int | None = None,
    recompute: str = "none",
    gpu: str = "h200",
    rank: int = 0,
    world: int = 1,
    **layout: Any,
) -> Forecast:
    """`device.load()` comes before, and all in one process have one rank and world. `layers`: only so many of the model's."""
    mode, waits = device.start(rank, world)
    from benchmarks._work import math_lengths, random_policy, random_sequences, train_flops
    from benchmarks.fake_cuda import exchange, fused
    from benchmarks.fake_cuda.trace import Trace
    from lens_megatron.mcore import step
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.mcore.pipeline import plan_for_this_layout
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.planning.gpus import GPUS, assumed_rates

    spec, parallel = load_model_spec(model), ParallelConfig(**layout)
    spec = replace(spec, layers=layers or spec.layers)
    lengths = math_lengths(packs * tokens * (world // parallel.model_ranks), tokens // 4)
    sequences = random_sequences(lengths, spec.vocab_size)

    def loss(logprobs_T: Any, entropy_T: Any, pack: Any) -> Any:
        return -logprobs_T.where(pack.target_T >= 0, 0.0).sum() / sum(lengths), {}

    trace = Trace(waits)
    fused.install(trace.count)
    exchange.experts()
    with mode, trace:
        policy = random_policy(spec, recompute, "triton", layout=parallel)  # type: ignore[arg-type]
        mine = plan_for_this_layout(lengths, tokens, policy.config)
        held = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
        exchange.pipeline([(pack.tokens // held, 1, spec.hidden_size) for pack in mine])
        trace.attended = sum(n * n / 2 for pack in mine for n in pack.padded_lengths) / len(mine) / parallel.cp
        policy.optimizer.step()  # the first allocates the moments
        trace.begin()
        step.train_step(policy, sequences, loss, tokens_per_microbatch=tokens)
    state, gib = trace.memory.now, 2.0**30
    rates, sheet = assumed_rates(GPUS[gpu]), GPUS[gpu].matmul
    lines = []
    for name, kernels in trace.kernels.items():
        rate = rates.attention if "attn" in name else rates.matmul
        seconds = max(kernels.flops / rate, kernels.bytes_moved / rates.bandwidth, kernels.launches * _LAUNCH)
        lines.append(
            Line(name, kernels.launches, kernels.bytes_moved / 1e9, kernels.flops / 1e12, round(seconds * 1e3, 3))
        )
    lines.sort(key=lambda line: -line.ms)
    total = sum(line.ms for line in lines)
    return Forecast(
        model=model,
        layout=", ".join(f"{key} {value}" for key, value in layout.items() if value != 1) or "one GPU",
        recompute=recompute,
        tokens=sum(lengths),
        pack_tokens=[pack.tokens for pack in mine],
        state_gib=round(state / gib, 2),
        peak_gib=round(trace.memory.peak / gib, 2),
        activations_gib=round((trace.memory.peak - state) / gib, 2),
        ms=round(total, 1),
        mfu=round(train_flops(spec, lengths) / world / (total / 1e3) / sheet, 3),
        waits=dict(waits),
        lines=lines,
    )


def show(found: Forecast, most: int = 16) -> str:
    words = [
        f"FORECAST, nothing measured: {found.model}, {found.layout}, recompute {found.recompute}, "
        f"{found.tokens} tokens in packs of {found.pack_tokens}",
        f"memory GiB: state {found.state_gib}, peak {found.peak_gib}, of it activations {found.activations_gib}",
        f"{found.ms} ms, {sum(line.launches for line in found.lines)} kernels, MFU {found.mfu} of the data sheet",
        *(f"the host waits {count} x at {place}" for place, count in found.waits.items()),
        f"{'kernel':32s} {'launches':>8s} {'GB':>9s} {'TFLOP':>8s} {'ms':>8s}     %",
    ]
    words += [
        f"{line.kernel:32s} {line.launches:8d} {line.gigabytes:9.2f} {line.teraflops:8.2f} {line.ms:8.2f}"
        f" {line.ms / found.ms:6.1%}"
        for line in found.lines[:most]
    ]
    return "\n".join(words)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a training step counted on a device that computes nothing")
    parser.add_argument("--model", default="qwen3-4b-base", help="one or several, with commas")
    parser.add_argument("--tokens", default="16384", help="budget of a micro-batch; one or several")
    parser.add_argument("--recompute", default="none", help="of none, light, selective, full; one or several")
    parser.add_argument("--layers", type=int, help="only so many of the model's")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--world", type=int, default=1)
    for name in ("tp", "cp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--json", metavar="F")
    given = parser.parse_args(argv)
    device.load()
    from benchmarks._machine import machine

    layout = {name: getattr(given, name) for name in ("tp", "cp", "pp", "ep")}
    found = []
    for model in given.model.split(","):
        for tokens in map(int, given.tokens.split(",")):
            for recompute in given.recompute.split(","):
                found.append(
                    forecast(
                        model,
                        tokens=tokens,
                        layers=given.layers,
                        recompute=recompute,
                        gpu=given.gpu,
                        world=given.world,
                        **layout,
                    )
                )
                print(show(found[-1]), end="\n\n", flush=True)
    if given.json:
        rows = [asdict(one) for one in found]
        Path(given.json).write_text(json.dumps({**machine(), "gpu": given.gpu, "forecasts": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
