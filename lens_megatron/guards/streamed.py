"""What an HF folder says of a text, computed layer by layer in fp32 from the files alone: no Megatron, no whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron.machine import usable_cores
from lens_megatron.routed_experts import Routing

_ROWS = 8  # of each tensor, spread over it


def streamed_logprobs(folder: Path, tokens: Sequence[int]) -> tuple[Tensor, Routing | None]:
    """log p(token | tokens before it) of all but the first, [T - 1], and the experts of a mixture. In memory: one layer, of
    experts one."""
    from checkpoints_tools.forward import states, weights_of
    from checkpoints_tools.sources import HfSource

    logits_TV = torch.empty(0)
    experts: list[Tensor] = []  # [T, K] a layer
    with _every_core():
        for name, value in states(weights_of(HfSource(folder)), list(tokens), experts.append):
            if name == "logits":
                logits_TV = value
    target_T = torch.tensor(tokens[1:])
    logprobs_T = logits_TV[:-1].log_softmax(-1).gather(1, target_T[:, None]).squeeze(1)
    return logprobs_T, Routing.of(torch.stack(experts, dim=1).numpy()) if experts else None


@contextmanager
def _every_core() -> Iterator[None]:
    """All other ranks wait for this one, which a launcher may have left a single thread; 70B take minutes so."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(16, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def different_exports(folder: Path, exported: Iterator[tuple[str, Tensor]]) -> tuple[list[tuple[str, str]], int]:
    """Of tensors about to leave for the engine, those that are not the folder's, by some rows of each; how many there were.

    Names that never came count as different.
    """
    from checkpoints_tools.sources import HfSource

    source = HfSource(folder)
    different: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, tensor in exported:
        seen.add(name)
        if (how := _difference(source, name, tensor)) is not None:
            different.append((name, how))
    different += [(name, "never came") for name in source.shapes if name not in seen]
    return different, len(source.shapes)


def _difference(source: object, name: str, tensor: Tensor) -> str | None:
    from checkpoints_tools.sources import HfSource

    assert isinstance(source, HfSource)
    shape = source.shapes.get(name)
    if shape is None:
        return "has no such tensor"
    if tuple(tensor.shape) != tuple(shape):
        return f"shape {tuple(tensor.shape)} for {tuple(shape)}"
    rows = shape[0]
    for place in sorted({round(i * (rows - 1) / max(1, _ROWS - 1)) for i in range(_ROWS)}):
        if not torch.equal(source.rows(name, place, place + 1).to(tensor.dtype)[0], tensor[place].cpu()):
            return f"row {place} has other values"
    return None
