"""Optimizer, schedule and random states as tensors that any layout can load.

Stored per parameter in the model's own shape (fp32 master weight and Adam's two moments), so that nothing in a checkpoint
knows how the distributed optimizer cut its buffers or into how many optimizers it was chained. Learning rates and decays
are not stored: RUN.yaml says them, and the schedule's position decides the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from lens_megatron.errors import RunError
from lens_megatron.mcore.host_moments import MomentsOnHost
from lens_megatron.mcore.moments import MOMENTS, begin_moments, is_torch_adam
from lens_megatron.mcore.optimizer import Optimizer, optimizer_parts
from lens_megatron.mcore.runtime import device

_STATES = ("param", *MOMENTS)


def optimizer_state(optimizer: Optimizer, model_state: dict[str, Any], metadata: dict[str, Any]) -> dict[int, Any]:
    """To be saved. Collective: each data-parallel group gathers its parts on the host of its first rank, and the others
    have none: not an empty one either, which Megatron-Core would warn of as a state in which ranks differ."""
    options = {**metadata, "distrib_optim_fully_reshardable_mem_efficient": True}
    state = {}
    for number, part in enumerate(optimizer_parts(optimizer.inner)):
        _ensure_moments(part)
        with _places_without_padding(part):
            gathered = part.sharded_param_state_fully_reshardable(model_state, metadata=options)
        if gathered:
            state[number] = gathered
    return state


@contextmanager
def _places_without_padding(part: Any) -> Iterator[None]:
    """Megatron-Core 0.16 joins a buffer's buckets without what fills each up, and then cuts parameters out at places that
    count it: behind the first filled bucket each would be saved shifted, the last ones filled up with zeros."""
    kept = [(buffer, buffer.param_index_map) for buffer in part.buffers]
    try:
        for buffer, places in kept:
            before, filled = [], 0  # what fills up the buckets before each
            for bucket in buffer.buckets:
                before.append(filled)
                filled += bucket.grad_data.numel() - bucket.numel_unpadded
            buffer.param_index_map = {
                parameter: (start - before[bucket], stop - before[bucket], bucket)
                for parameter, (start, stop, bucket) in places.items()
            }
        yield
    finally:
        for buffer, places in kept:
            buffer.param_index_map = places


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, model_state: dict[str, Any], folder: Path, adam_step: int) -> None:
    """Each rank reads the parameters it owns a part of. Collective; one kind of state at a time bounds host memory."""
    places = {
        id(place.data): place
        for place in nested_values(model_state)
        if isinstance(place, (ShardedTensor, ShardedTensorFactory))
    }
    owned = [(part, *own) for part in optimizer_parts(optimizer.inner) for own in owned_ranges(part)]
    values: list[dict[str, Tensor]] = [{} for _ in owned]
    for kind in _STATES:
        wanted = {number: _stored(kind, places[id(own[1])]) for number, own in enumerate(owned)}
        found = dist_checkpointing.load({"state": wanted}, str(folder), validate_access_integrity=False)
        for number, (_, _, start, stop) in enumerate(owned):
            values[number][kind] = found["state"][number].flatten()[start:stop].clone()
    stepped: list[dict[str, Any]] = []
    step_devices: dict[int, torch.device] = {}
    for part in optimizer_parts(optimizer.inner):
        _ensure_moments(part)
        # Megatron-Core's setter wants every entry of a state, and the step is no tensor of the file
        for state in part.optimizer.state.values():
            step = state.pop("step", None)
            if step is not None:
                stepped.append(state)
                step_devices[id(state)] = step.device
    for (part, parameter, _, _), tensors in zip(owned, values, strict=True):
        part._set_main_param_and_optimizer_states(parameter, tensors)
    for state in stepped:
        # a tensor each: torch's AdamW adds 1 in place, once for every parameter
        state["step"] = torch.tensor(float(adam_step), dtype=torch.float32, device=step_devices[id(state)])
    for part in optimizer_parts(optimizer.inner):
        if not is_torch_adam(part.optimizer):
            for group in part.optimizer.param_groups:
                group["step"] = adam_step


def adam_step(optimizer: Optimizer) -> int:
    """How many updates Adam's bias correction has seen: one number for all parameters and ranks. Collective."""
    seen = {step for part in optimizer_parts(optimizer.inner) for step in _adam_steps(part.optimizer)}
    # a rank may own no part of any parameter; it takes the others' number
    bounds = torch.tensor([max(seen, default=-1), -min(seen, default=2**31)], dtype=torch.int64, device=device())
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    highest, lowest = int(bounds[0]), -int(bounds[1])
    if highest > lowest and lowest != 2**31:
        raise RunError(
            f"optimizer: parameters have seen between {lowest} and {highest} updates; all must have seen as many"
        )
    return max(highest, 0)


def set_schedule(optimizer: Optimizer, steps: int) -> None:
    """Megatron-Core's own loader adds to the position; and refuses a run whose learning rate was changed."""
    optimizer.scheduler.num_steps = steps
    optimizer.scheduler.step(increment=0)


def random_states() -> dict[str, Tensor]:
    """This rank's generators, as bytes."""
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {"cpu": torch.get_rng_state(), **{f"tracker.{name}": state for name, state in tracker.items()}}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.detach().cpu().clone() for name, state in states.items()}


def sharded_random_states(states: dict[str, Tensor]) -> dict[str, ShardedTensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, rank, ranks), prepend_axis_num=1)
        for name, state in states.items()
    }


def set_random_states(states: dict[str, Tensor]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracked = {name: states[f"tracker.{name}"] for name in tracker.get_states()}
    tracker.set_states(tracked)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def owned_ranges(part: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters of which this rank updates a part, and which part: elements [start, stop) of the flattened tensor."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _stored(kind: str, place: Any) -> Any:
    # zeros: rows of a padded vocabulary that the file does not have stay defined
    zeros = torch.zeros(place.data.shape, dtype=torch.float32)
    options: dict[str, Any] = {"key": f"optimizer.state.{kind}.{place.key}", "data": zeros}
    if isinstance(place, ShardedTensor):
        options["dtype"] = zeros.dtype
    return replace(place, **options)


def _ensure_moments(part: Any) -> None:
    """Before the first update there are none."""
    inner = part.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if isinstance(inner, MomentsOnHost):
                inner.first_state(parameter, group)
            else:
                begin_moments(inner, parameter, group, parameter.device)


def _adam_steps(inner: Any) -> set[int]:
    own = {int(state["step"]) for state in inner.state.values() if "step" in state}
    return own | {int(group["step"]) for group in inner.param_groups if group["params"] and "step" in group}
