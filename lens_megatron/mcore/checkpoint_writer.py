"""A sharded state onto disk: planned together, then written by a thread of each rank that needs nobody else.

Megatron-Core plans which rank writes which part (its torch_dist format) but writes through forked processes and a
manager process of its own: forking beside gloo's or CUDA's threads may hang, and a full disk is lost on the way. Here
the parts are copied to host memory and written by a plain thread; all collectives stay with the caller.
"""

from __future__ import annotations

import io
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item

from lens_megatron.checkpoints import write_file
from lens_megatron.mcore.agreement import everywhere


@dataclass
class Written:
    """What one rank wrote: for the index of tensors, and for the manifest."""

    results: list[Any] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Staged:
    """This rank's part of a state, in memory that training does not touch."""

    folder: Path
    files: list[tuple[str, list[tuple[Any, Any]]]]  # name, (write item, tensor or bytes)
    more: dict[str, Callable[[], bytes]]  # rank 0's small files
    write_index: Callable[[Sequence[list[Any]]], None]  # rank 0, once all ranks have written

    def write(self) -> Written:
        """No collective, no CUDA: fit for a thread. Frees each file's tensors once they are on disk."""
        written = Written()
        while self.files:
            name, items = self.files.pop()
            with _File(self.folder / name) as file:
                written.results += [file.write_item(name, item, data) for item, data in items]
                written.sizes[name] = file.sync()
        for name, content in self.more.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            written.sizes[name] = write_file(self.folder / name, content())
        return written


def stage(
    state: dict[str, Any], folder: Path, live: set[int], more: Mapping[str, Callable[[], bytes]], copy: bool
) -> Staged:
    """Collective. `live`: addresses of the storages that training changes; `copy`: training goes on while we write."""
    # Megatron-Core would start a manager process for this queue, which only its own writers use.
    filesystem_async._results_queue = queue.Queue()
    # its check that every part is saved exactly once runs on rank 0 alone
    sharded, common = everywhere(lambda: save_preprocess(state))
    plan = _PlanOnly("torch_dist", 1, thread_count=1)
    plan.async_save(sharded, folder)

    def mine(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to("cpu")
        return tensor.clone() if copy and tensor.untyped_storage().data_ptr() in live else tensor

    files = [
        (name, [*bytes_items, *((item, mine(tensor)) for item, tensor in tensor_items)])
        for _, name, (bytes_items, tensor_items) in plan.writer.write_buckets
    ]
    buffer = io.BytesIO()
    torch.save(common, buffer)
    every = {"common.pt": buffer.getvalue, **more}

    def write_index(results: Sequence[list[Any]]) -> None:
        plan.writer.finish(plan.metadata, results)

    return Staged(folder, files, dict(every) if torch.distributed.get_rank() == 0 else {}, write_index)


class _PlanOnly(TorchDistSaveShardedStrategy):
    writer: Any
    metadata: Any  # of all ranks' tensors, on rank 0

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        if self.metadata is not None:
            del self.metadata.all_local_plans  # only serves a cache that is off; would pickle every rank's plan
        return AsyncRequest(None, (), [])


class _File(io.FileIO):
    """Remembers why a write failed: torch.save reports no more than that it did."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._error: OSError | None = None

    def write_item(self, name: str, item: Any, data: Any) -> Any:
        transforms = _StorageWriterTransforms()
        try:
            return _write_item(transforms, self, data, item, name, SerializationFormat.TORCH_SAVE)
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
            raise
        return size

    def sync(self) -> int:
        os.fsync(self.fileno())
        return self.tell()
