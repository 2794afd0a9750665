"""A checkpoint read by all ranks together: they succeed, or all raise the same error, and know whether it is damage.

Megatron-Core lets every rank read the small files by itself, each time that it loads something, before the ranks meet: an
error there would leave the others waiting in a collective, and torch keeps no more than its text of one in reading the
index. Here rank 0's common.pt is everyone's, and the index is read once, and agreed on, before any tensor.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, get_default_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint.api import CheckpointException

from lens_megatron import checkpoints
from lens_megatron.checkpoints import Damaged, Unreadable
from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore.agreement import on_rank_0, one_line

_T = TypeVar("_T")


def looked_at(action: Callable[[], _T]) -> _T:
    """`on_rank_0`, whose errors are of one kind: here every rank must know whether to try again, or an older one."""

    def outcome() -> tuple[Any, Damaged | Unreadable | None]:
        try:
            return action(), None
        except (Damaged, Unreadable) as error:
            return None, error

    found, error = on_rank_0(outcome)
    if error is not None:
        raise error
    return found


@contextlib.contextmanager
def opened(folder: Path, common: Mapping[str, Any]) -> Iterator[None]:
    """Around dist_checkpointing.load of `folder`, once or more. `common`: what common.pt holds. Collective."""
    index = _index(folder)
    strategies = get_default_strategy(StrategyAction.LOAD_SHARDED, "torch_dist", 1), _Common(common)

    def reader(*_: Any, **__: Any) -> CachedMetadataFileSystemReader:
        one = CachedMetadataFileSystemReader(str(folder))
        one._cached_metadata = index
        return one

    before = serialization.verify_checkpoint_and_load_strategy, torch_strategy._get_filesystem_reader
    serialization.verify_checkpoint_and_load_strategy = lambda *_: strategies
    torch_strategy._get_filesystem_reader = reader
    try:
        yield
    except CheckpointException as error:  # of some rank, told to all; with every rank's traceback
        failures = {rank: cause for rank, (cause, _) in error.failures.items()}
        raise verdict(folder, failures or {dist.get_rank(): ValueError(str(error))}) from error
    except CheckpointingException as error:
        raise verdict(folder, {dist.get_rank(): error}) from error
    finally:
        serialization.verify_checkpoint_and_load_strategy, torch_strategy._get_filesystem_reader = before


class _Common(TorchCommonLoadStrategy):
    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return copy.deepcopy(dict(self._found))  # tensors are merged into it


def _index(folder: Path) -> Any:
    index, error = None, None
    try:
        index = CachedMetadataFileSystemReader(str(folder)).read_metadata()
    except Exception as failure:
        error = failure
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failures = {rank: failure for rank, failure in enumerate(errors) if failure is not None}
    if failures:
        raise verdict(folder, failures)
    return index


def verdict(folder: Path, failures: Mapping[int, BaseException]) -> BaseException:
    """What to raise for what ranks met in reading `folder`, which had every file in its size when rank 0 looked."""
    for rank, error in failures.items():
        if not isinstance(error, Exception) or isinstance(error, (RunError, UsageError)):
            # a signal's: torch hands on whatever interrupts a rank that reads as if reading had failed
            return error if rank == dist.get_rank() else RunError(f"rank {rank} was interrupted: {one_line(error)}")
    for error in failures.values():
        # not there: it was for rank 0, so that this rank's view of the file system is another
        if isinstance(error, FileNotFoundError) or (
            isinstance(error, OSError) and not checkpoints.is_of_content(error)
        ):
            return checkpoints.unreadable(folder, error)
    for error in failures.values():
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return RunError(f"{folder}: not loaded, for want of memory ({one_line(error)})")
    return Damaged(f"{folder}: cannot be loaded ({one_line(next(iter(failures.values())))}); load an earlier one")
