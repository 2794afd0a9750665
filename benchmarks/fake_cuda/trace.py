"""What runs on the fake device: kernels with the bytes they must move and their FLOPs, and the memory held at once.

Memory is what is asked of the allocator: a real one also rounds up and leaves gaps.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_cuda.device import place

_NOTHING_RUNS = {
    "prim::device",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::detach",
}


_COPIES = {"aten::_to_copy", "aten::copy_"}


@dataclass
class Kernels:
    launches: int = 0
    bytes_moved: float = 0.0
    flops: float = 0.0


@dataclass
class Memory:
    now: int = 0
    peak: int = 0
    sizes: dict[int, int] = field(default_factory=dict)

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or tensor.device.type != "cuda":
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Trace(TorchDispatchMode):
    """Under it every operation on the device is counted."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits
        self.kernels: dict[str, Kernels] = {}
        self.memory = Memory()
        self.attended = 0.0  # pairs of query and key in a pack, a head: causal attention's share depends on lengths

    def begin(self) -> None:
        """From here on, with what is held already."""
        self.waits.clear()
        self.kernels.clear()
        self.memory.peak = self.memory.now

    def count(self, name: str, flops: float = 0.0, bytes_moved: float = 0.0) -> None:
        kernels = self.kernels.setdefault(name, Kernels())
        kernels.launches += 1
        kernels.flops += flops
        kernels.bytes_moved += bytes_moved

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        read, written = list(_tensors((args, kwargs))), list(_tensors(result))
        for tensor in written:
            self.memory.see(tensor)
        name = function._schema.name
        if name in _COPIES and read and not written:
            self.waits[place()] += 1  # to the host
        if name not in _NOTHING_RUNS and written and not _only_looks(function, read, written):
            self.count(
                name.split("::")[1], self._flops(function, args, kwargs, result), sum(map(_bytes, read + written))
            )
        return result

    def _flops(self, function: Any, args: Any, kwargs: Any, result: Any) -> float:
        name = function._schema.name
        if "varlen_attn" in name:
            backward = "backward" in name
            query = args[1] if backward else args[0]
            return self.attended * query.shape[1] * query.shape[2] * (10.0 if backward else 4.0)
        counted = flop_registry.get(function.overloadpacket)
        return float(counted(*args, **kwargs, out_val=result)) if counted else 0.0


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _only_looks(function: Any, read: list[torch.Tensor], written: list[torch.Tensor]) -> bool:
    """A view moves nothing."""
    if function._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    return all(tensor.untyped_storage()._cdata in storages for tensor in written)
