"""Models off their device and back. On a GPU this is unverified; on CPU the same code runs.

A policy leaves for an engine that takes turns with the trainer on the same GPUs: every tensor keeps its storage object,
which is emptied and filled again, so that views into Megatron-Core's flat buffers, its optimizer's shards and its
communication buckets all stay valid. A frozen model, the reference, lives on the host and visits the device to score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from lens_megatron.mcore.optimizer import optimizer_parts
from lens_megatron.mcore.pinning import may_pin
from lens_megatron.mcore.runtime import device
from lens_megatron.mcore.step import ShardedModel, Trainable

PIECE_BYTES = 2**28  # of a host copy: torch rounds what it pins up to a power of two, and a flat buffer is tens of GB


def give_back_cache() -> None:
    """Of device memory: what the allocator keeps though no tensor needs it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Residence:
    """Where a policy's weights, gradients and optimizer state are. On the host they are pinned where there is room for it, as
    decided when they leave first: torch keeps what it has pinned for the next time."""

    def __init__(self, policy: Trainable) -> None:
        self._policy = policy
        self._away: list[tuple[torch.UntypedStorage, int, list[Tensor] | None]] = []  # storage, bytes, its content
        self._pinned: bool | None = None

    @property
    def on_device(self) -> bool:
        return not self._away

    @torch.no_grad()
    def release(self) -> int:
        """Bytes that the device got back. Gradients are not kept: every step begins by zeroing them."""
        if self._away:
            return 0
        leaving = self._storages()
        if self._pinned is None:
            sizes = [size for storage, kept in leaving if kept for size in _piece_sizes(storage.nbytes())]
            self._pinned = may_pin(sizes)
        for storage, kept in leaving:
            self._away.append((storage, storage.nbytes(), _host_copy(storage, self._pinned) if kept else None))
        for storage, _, _ in self._away:
            storage.resize_(0)
        _forget_what_is_made_again()
        give_back_cache()
        return sum(size for _, size, _ in self._away)

    @torch.no_grad()
    def restore(self) -> None:
        for storage, size, content in self._away:
            storage.resize_(size)
            bytes_B = _bytes_of(storage)
            if content is None:
                bytes_B.zero_()
            else:
                for part_B, piece_B in zip(bytes_B.split(PIECE_BYTES), content, strict=True):
                    part_B.copy_(piece_B)
        self._away = []

    def _storages(self) -> list[tuple[torch.UntypedStorage, bool]]:
        """Of this rank's device, each once: moments that live on the host anyway (memory.offload_optimizer) stay there."""
        seen: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        for tensor, kept in self._tensors():
            storage = tensor.untyped_storage()
            if storage.device.type == device().type and storage.nbytes() > 0:
                seen.setdefault(storage._cdata, (storage, kept))
        return list(seen.values())

    def _tensors(self) -> Iterator[tuple[Tensor, bool]]:
        """Everything that the policy holds, and whether its content must come back."""
        for chunk in self._policy.chunks:
            for buffer in _flat(chunk):
                if buffer.grad_data is not None:
                    yield buffer.grad_data, False
                if buffer.param_data is not None:
                    yield buffer.param_data, True
            for parameter in chunk.parameters():
                yield parameter.data, True
        for part in optimizer_parts(self._policy.optimizer.inner):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter.data, True
                    if parameter.grad is not None:
                        yield parameter.grad, False
            for state in part.optimizer.state.values():
                for value in state.values():
                    if torch.is_tensor(value):
                        yield value, True


class FrozenOnHost:
    """A frozen model whose weights are on the host, and on the device while it is wanted there. They never change: to leave,
    nothing is copied. Pinned where the host has room for it, which makes the way to a GPU several times faster."""

    def __init__(self, model: ShardedModel) -> None:
        self._parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
        sizes = [parameter.data.untyped_storage().nbytes() for parameter in self._parameters]
        pinned = may_pin(sizes)
        self._on_host = [_kept(parameter.data, pinned) for parameter in self._parameters]
        self.leave()

    def arrive(self, where: torch.device) -> None:
        for parameter, kept in zip(self._parameters, self._on_host, strict=True):
            parameter.data = kept.to(where, non_blocking=True)  # what uses it is in the same stream

    def leave(self) -> None:
        for parameter, kept in zip(self._parameters, self._on_host, strict=True):
            parameter.data = kept


def _kept(tensor: Tensor, pinned: bool) -> Tensor:
    if not pinned:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _forget_what_is_made_again() -> None:
    """Of Megatron-Core's: angles by length, and the buffer that sequence parallelism gathers into. Small, but each may lie in
    a large piece of memory, which the allocator then cannot give back."""
    RotaryEmbedding.forward.cache_clear()
    parallel_state.get_global_memory_buffer().buffer.clear()


def _flat(chunk: torch.nn.Module) -> list[Any]:
    """Megatron-Core's flat buffers of parameters and gradients."""
    buffers: list[Any] = chunk.buffers  # type: ignore[assignment]  # torch's own method of that name is hidden by it
    expert_buffers: list[Any] = chunk.expert_parallel_buffers  # type: ignore[assignment]
    return buffers + expert_buffers


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_copy(storage: torch.UntypedStorage, pinned: bool) -> list[Tensor]:
    parts = _bytes_of(storage).split(PIECE_BYTES)
    return [torch.empty(part_B.shape, dtype=torch.uint8, pin_memory=pinned).copy_(part_B) for part_B in parts]


def _piece_sizes(size: int) -> list[int]:
    return [min(PIECE_BYTES, size - start) for start in range(0, size, PIECE_BYTES)]


def residual_bytes() -> int:
    """What this process still holds of its GPU; 0 without one."""
    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else 0
