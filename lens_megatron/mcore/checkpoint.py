"""Saving and resuming a run: model, optimizer, schedule, random states and the loop's own state, in any layout.

Every function is collective: all ranks call it, in the same order, and all succeed or raise the same error. The stored
form is Megatron-Core's torch_dist; what a folder must have to count as a checkpoint is in lens_megatron/checkpoints.py.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

import lens_megatron
from lens_megatron import checkpoints
from lens_megatron.checkpoints import Damaged, Manifest
from lens_megatron.errors import RunError, UsageError
from lens_megatron.mcore import checkpoint_index, checkpoint_optimizer, checkpoint_reader, safe_pickle
from lens_megatron.mcore.agreement import on_rank_0, one_line
from lens_megatron.mcore.checkpoint_writer import Staged, Written, stage
from lens_megatron.mcore.hf_companions import companion_readers
from lens_megatron.mcore.model import innermost
from lens_megatron.mcore.runtime import cuda_literals
from lens_megatron.mcore.safe_pickle import Refused
from lens_megatron.mcore.step import ShardedModel, Trainable
from lens_megatron.mcore.stored_dtypes import BY_NAME
from lens_megatron.model_spec import to_hf_config

_EXTRA, _HF = "extra.json", "hf"
_EXTRA_STATE = "_extra_state"
_ROUND_S = 5.0
_MEETING_S = 5.0  # within which all ranks have failed, when they failed alike
COMPLETING_S = 60.0  # manifest, index and names, once all is written
# what a rank says of the records that it wrote
_OF_PARTS = {(kind.__module__, kind.__name__): kind for kind in (WriteResult, MetadataIndex, torch.Size, _StorageInfo)}
_saves = 0  # begun by this process: every rank has begun as many, so that their keys agree


class PendingSave:
    """A save under way. `done` and `wait` are collective; the call that finds all ranks finished makes it visible. `rescue`
    is for when they are no longer known to be in step."""

    def __init__(self, folder: Path, staged: Staged, manifest: Callable[[dict[str, int]], Manifest]) -> None:
        global _saves
        _saves += 1
        self._key = f"lens/save/{_saves}"
        self.folder = folder
        self._staged = staged
        self._manifest = manifest
        self._written = Written()
        self._error: str | None = None  # of this rank's writer
        self._finished = False
        self._failure: RunError | None = None  # raised again by every later call
        self.still_writing = -1  # when a wait ran out of time: the first rank that had not written
        # daemon: a run that dies does not wait for a checkpoint that nobody will complete
        self._thread = threading.Thread(target=self._write, name=f"save {folder.name}", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the checkpoint is complete and visible. Raises RunError if any rank failed to write."""
        return self.wait(timeout_s=0.0)

    def wait(self, timeout_s: float | None = None) -> bool:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._finished:
            # in short rounds: ranks that have written wait for the others in a collective, which has a time limit
            self._thread.join(max(0.0, min(_ROUND_S, deadline - time.monotonic())))
            writing = self._thread.is_alive()
            first = dist.get_rank() if writing else dist.get_world_size()
            state = torch.tensor([not writing, time.monotonic() < deadline, first], dtype=torch.int32)
            dist.all_reduce(state, dist.ReduceOp.MIN)
            all_written, go_on, self.still_writing = state.tolist()
            if all_written:
                self._finish()
            elif not go_on:
                return False
        if self._failure is not None:
            raise self._failure
        return True

    def rescue(self, patience_s: float) -> bool:
        """Complete it after an error of the run: whether it is now. If all ranks come here within seconds, and have written
        within `patience_s`; by the store alone, every wait with a limit: nobody knows in which collective another rank was
        when it failed, or whether it lives. A rank that failed alone is back after `_MEETING_S`."""
        if self._finished:
            return False
        self._finished = True  # what comes of it is final
        store: Any = dist.distributed_c10d._get_default_store()
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        store.set(f"{self._key}/here/{rank}", "")
        if not _all_set(store, [f"{self._key}/here/{one}" for one in ranks], _MEETING_S):
            return False
        deadline = time.monotonic() + patience_s + _MEETING_S
        self._thread.join(patience_s)
        mine = None if self._thread.is_alive() else self._part()
        store.set(f"{self._key}/part/{rank}", pickle.dumps(mine))
        end = f"{self._key}/end"
        if rank != 0:  # until rank 0 has ended it: who started the ranks ends all of them when one leaves
            ended = _all_set(store, [end], deadline - time.monotonic() + COMPLETING_S)
            return ended and bool(store.get(end) == b"complete")
        outcome = "not complete"
        try:
            keys = [f"{self._key}/part/{one}" for one in ranks]
            parts = []
            if _all_set(store, keys, deadline - time.monotonic()):
                parts = [safe_pickle.load(io.BytesIO(store.get(key)), _OF_PARTS, key) for key in keys]
            if parts and None not in parts:
                self._complete(parts)
                outcome = "complete"
        finally:
            store.set(end, outcome)
        return outcome == "complete"

    def _part(self) -> tuple[str | None, list[Any], dict[str, int]]:
        return self._error, self._written.results, self._written.sizes

    def _finish(self) -> None:
        self._finished = True
        all_ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._part(), all_ranks, dst=0)
        try:
            on_rank_0(partial(self._complete, all_ranks or []))
        except RunError as failure:
            self._failure = failure
        del self._staged

    def _write(self) -> None:
        try:
            self._written = self._staged.write()
        except Exception as error:  # reaches every rank at the next collective call
            self._error = one_line(error)

    def _complete(self, all_ranks: list[tuple[str | None, list[Any], dict[str, int]]]) -> None:
        failures = [f"rank {rank}: {error}" for rank, (error, _, _) in enumerate(all_ranks) if error is not None]
        partial_folder = self._staged.folder
        try:
            if failures:
                raise checkpoints.failed_to_write(self.folder, failures[0])
            self._staged.write_index([results for _, results, _ in all_ranks])
            backend = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
            sizes = {name: size for _, _, part in all_ranks for name, size in part.items()}
            sizes["metadata.json"] = checkpoints.write_file(partial_folder / "metadata.json", backend.encode())
            sizes[".metadata"] = (partial_folder / ".metadata").stat().st_size
            checkpoints.complete(self.folder, self._manifest(sizes))
        except Exception as error:
            checkpoints.abandon(self.folder)
            if isinstance(error, RunError):
                raise
            raise checkpoints.failed_to_write(self.folder, one_line(error)) from error


def _all_set(store: Any, keys: list[str], limit_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=max(0.1, limit_s)))
    except dist.DistStoreError:  # in time, or at all: its holder may have gone
        return False
    return True


def save(
    policy: Trainable,
    folder: Path,
    extra: Mapping[str, Any],
    asynchronous: bool = False,
    *,
    step: int,
    metrics: Mapping[str, float] | None = None,
    companions_from: Path | None = None,
    template: str | None = None,
    with_optimizer: bool = True,
) -> PendingSave:
    """Begin to write `folder`. `extra`: rank 0's, anything JSON; `companions_from`: HF folder with the tokenizer. `template`:
    of the prompts that the weights were trained on.

    Asynchronous: returns when everything is copied to host memory; training may change the weights at once. Call
    `done()` on all ranks now and then, or `wait()`. Otherwise the checkpoint is complete on return.
    """
    text = ""

    def encode() -> None:
        nonlocal text
        text = json.dumps(dict(extra), allow_nan=False)

    on_rank_0(encode)  # the text itself, perhaps long, stays there
    target = on_rank_0(lambda: checkpoints.begin(folder))
    with cuda_literals(), torch.no_grad():
        state = _everything(policy, step) if with_optimizer else {**_model_state(policy), "trainer": {"step": step}}
        if with_optimizer:
            states = checkpoint_optimizer.random_states()
            state["trainer"]["rng"] = sorted(states)
            state["rng"] = checkpoint_optimizer.sharded_random_states(states)
        more: dict[str, Callable[[], bytes]] = {_EXTRA: text.encode, **_companions(policy, companions_from, template)}
        staged = stage(state, target, _live_storages(policy), more, copy=asynchronous)
    del state

    def manifest(sizes: dict[str, int]) -> Manifest:
        return Manifest(
            step=step,
            model=asdict(policy.spec),
            layout=layout_of(policy),
            world_size=dist.get_world_size(),
            dtype=dtype_of(policy),
            optimizer=with_optimizer,
            files=sizes,
            metrics={name: float(value) for name, value in (metrics or {}).items() if abs(value) < float("inf")},
            version=lens_megatron.__version__,
        )

    pending = PendingSave(folder, staged, manifest)
    if not asynchronous:
        pending.wait()
    return pending


def load(policy: Trainable, folder: Path) -> dict[str, Any]:
    """Everything that `save` wrote into `policy`; what it got as `extra`. Written in any layout. Raises Damaged when the
    content is wrong, Unreadable when the file system does not give it.

    The generators continue only in the layout that wrote them. A checkpoint without optimizer gives the weights
    and its step's place in the learning-rate schedule.
    """
    manifest, extra, common = checkpoint_reader.looked_at(lambda: _opened(policy, folder))
    with cuda_literals(), torch.no_grad(), checkpoint_reader.opened(folder, common):
        found = dist_checkpointing.load(_wanted(policy), str(folder))
        _take_weights(policy, found)
        trainer = found["trainer"]
        if not manifest.optimizer:
            policy.optimizer.inner.reload_model_params()
            checkpoint_optimizer.set_schedule(policy.optimizer, manifest.step)
            return extra
        places = _wanted(policy)  # again: loading empties the first
        checkpoint_optimizer.load_optimizer(policy.optimizer, places, folder, trainer["adam_step"])
        checkpoint_optimizer.set_schedule(policy.optimizer, trainer["schedule_step"])
        states = checkpoint_optimizer.random_states()
        if manifest.layout == layout_of(policy) and trainer["rng"] == sorted(states):
            wanted = {"rng": checkpoint_optimizer.sharded_random_states(states)}
            checkpoint_optimizer.set_random_states(dist_checkpointing.load(wanted, str(folder))["rng"])
    return extra


def load_weights(model: ShardedModel, folder: Path) -> None:
    """The weights alone, into a policy or into a model that only scores."""
    _, _, common = checkpoint_reader.looked_at(lambda: _opened(model, folder))
    with cuda_literals(), torch.no_grad(), checkpoint_reader.opened(folder, common):
        _take_weights(model, dist_checkpointing.load(_wanted(model), str(folder)))
    if isinstance(model, Trainable):
        model.optimizer.inner.reload_model_params()


def _everything(policy: Trainable, step: int) -> dict[str, Any]:
    model_state = _model_state(policy)
    optimizer = checkpoint_optimizer.optimizer_state(policy.optimizer, model_state, _metadata())
    return {
        **model_state,
        **({"optimizer": optimizer} if optimizer else {}),
        "trainer": {
            "step": step,
            "adam_step": checkpoint_optimizer.adam_step(policy.optimizer),
            "schedule_step": policy.optimizer.scheduler.num_steps,
        },
    }


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(model: ShardedModel) -> dict[str, Any]:
    for chunk in model.chunks:
        settings = getattr(chunk, "ddp_config", None)
        if settings is not None and settings.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]  # else weights are those before the step
    # the innermost module: a wrapper would put its own prefix before every name
    return {
        f"model{number}": innermost(chunk).sharded_state_dict(metadata=_metadata())
        for number, chunk in enumerate(model.chunks)
    }


def _wanted(model: ShardedModel) -> dict[str, Any]:
    """Without the modules' `_extra_state`: FP8's, which is not used. Transformer Engine's norms have one, the plain ones
    none, so that a checkpoint made without it (converted on a CPU, say) could not be loaded with it."""
    return {
        chunk: {name: place for name, place in state.items() if _EXTRA_STATE not in name}
        for chunk, state in _model_state(model).items()
    }


def _take_weights(model: ShardedModel, found: Mapping[str, Any]) -> None:
    for number, chunk in enumerate(model.chunks):
        missing, unknown = innermost(chunk).load_state_dict(found[f"model{number}"], strict=False)
        if wrong := [name for name in (*missing, *unknown) if _EXTRA_STATE not in name]:
            raise AssertionError(f"weights that were not loaded: {wrong}")


def _live_storages(policy: Trainable) -> set[int]:
    models = [innermost(chunk) for chunk in policy.chunks]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _companions(model: ShardedModel, source: Path | None, template: str | None) -> dict[str, Callable[[], bytes]]:
    """What an HF folder has besides weights, so that one can be written from the checkpoint alone: the source's, as beside
    any other copy of these weights; without one, what the model's shape says."""
    files = companion_readers(source, BY_NAME[dtype_of(model)], template) if source is not None else {}
    if "config.json" not in files:  # no source, or one that is no longer there
        config = json.dumps(to_hf_config(model.spec, dtype_of(model)), indent=2) + "\n"
        files["config.json"] = config.encode
    return {f"{_HF}/{name}": read for name, read in files.items()}


def layout_of(model: ShardedModel) -> dict[str, Any]:
    config = model.config
    return {
        "tp": config.tensor_model_parallel_size,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        "etp": config.expert_tensor_parallel_size,
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def dtype_of(model: ShardedModel) -> str:
    return str(model.config.params_dtype).removeprefix("torch.")


def _opened(model: ShardedModel, folder: Path) -> tuple[Manifest, dict[str, Any], dict[str, Any]]:
    """Manifest, the loop's own state, and what common.pt holds."""
    manifest = checkpoints.read_manifest(folder)
    checkpoints.check_same_model(folder, manifest, asdict(model.spec))
    reason = checkpoints.damage(folder, manifest)
    if reason is not None:
        raise Damaged(f"{folder}: damaged: {reason}; load an earlier one")
    try:
        common = checkpoint_index.check(folder)  # Megatron-Core unpickles whatever it finds
    except Refused:
        raise
    except UsageError as error:
        raise Damaged(f"{error}; load an earlier one") from None
    try:
        with checkpoints.reading(folder / _EXTRA):
            return manifest, json.loads((folder / _EXTRA).read_text(encoding="utf-8")), common
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder / _EXTRA}: damaged: {error}; load an earlier one") from None
