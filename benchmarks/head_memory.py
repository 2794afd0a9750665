"""Memory of the head: its forward and backward pass beyond inputs and gradients, against materialised fp32 logits.

    python benchmarks/head_memory.py [--tokens N] [--dtype fp32|bf16] [--json benchmarks/results/head_memory_cpu.json]

Peaks are what torch's allocator handed out at once: its own statistics on CUDA, the profiler's allocation events on CPU.
The gradients of hidden states and weights are subtracted: whoever trains pays for them in any case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron.mcore.head import token_logprobs_and_entropy

TARGET = 0.05
_MATERIALISED_TOKENS = 1024
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Measurement:
    device: str
    torch: str
    python: str
    date: str
    threads: int
    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    logits_bytes: int  # [tokens, vocabulary] in fp32
    head_bytes: int  # peak beyond inputs and gradients
    # the same of log_softmax over the whole vocabulary under autograd, a lower bound; null where it would not fit
    materialised_bytes: int | None
    ratio: float  # head_bytes / logits_bytes


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` held at once, what existed before it not counted."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = work()  # kept until the profiler stops, so that its release is no event
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def materialised(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """What the head replaces."""
    logp_TV = (hidden_TH @ weight_VH.t()).float().log_softmax(-1)
    return logp_TV.gather(1, labels_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)


def measure(tokens: int, hidden: int, vocabulary: int, dtype: str) -> Measurement:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    kind = _DTYPES[dtype]
    generator = torch.Generator(where).manual_seed(0)
    hidden_TH = torch.empty(tokens, hidden, dtype=kind, device=where).normal_(generator=generator).requires_grad_()
    weight_VH = torch.empty(vocabulary, hidden, dtype=kind, device=where).normal_(0, 0.02, generator=generator)
    weight_VH.requires_grad_()
    labels_T = torch.randint(0, vocabulary, (tokens,), device=where, generator=generator)

    def both_passes(head: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> object:
        logprobs_T, entropy_T = head(hidden_TH, weight_VH, labels_T)
        return torch.autograd.grad((logprobs_T + 0.01 * entropy_T).sum(), (hidden_TH, weight_VH))

    gradients = (hidden_TH.numel() + weight_VH.numel()) * hidden_TH.element_size()

    def beyond_gradients(head: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> int:
        # in the forward pass there are no gradients yet that could be subtracted
        forward = peak_bytes(lambda: head(hidden_TH, weight_VH, labels_T))
        return max(forward, peak_bytes(lambda: both_passes(head)) - gradients)

    head_bytes = beyond_gradients(token_logprobs_and_entropy)
    return Measurement(
        device=_device(),
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.date.today().isoformat(),
        threads=torch.get_num_threads(),
        tokens=tokens,
        hidden=hidden,
        vocabulary=vocabulary,
        dtype=dtype,
        logits_bytes=tokens * vocabulary * 4,
        head_bytes=head_bytes,
        materialised_bytes=beyond_gradients(materialised) if tokens <= _MATERIALISED_TOKENS else None,
        ratio=head_bytes / (tokens * vocabulary * 4),
    )


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.machine()}"


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="memory of the head against materialised fp32 logits")
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 128, help="default: 8192 on a GPU, 128 without")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16" if gpu else "fp32")
    parser.add_argument("--json", metavar="F", help="write the measurement as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.tokens, arguments.hidden, arguments.vocabulary, arguments.dtype)
    mib = 2**20
    print(f"{found.device}; torch {found.torch}; {found.date}")
    print(f"{found.tokens:,} tokens, hidden {found.hidden:,}, vocabulary {found.vocabulary:,}, {found.dtype}")
    print(f"fp32 logits, one copy          {found.logits_bytes / mib:10.1f} MiB")
    if found.materialised_bytes is not None:
        print(f"materialised, peak at least    {found.materialised_bytes / mib:10.1f} MiB")
    print(f"this head, peak                {found.head_bytes / mib:10.1f} MiB")
    print(f"head / fp32 logits             {found.ratio:10.2%}       (target: below {TARGET:.0%})")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
