"""Process groups and devices; and, on a machine without CUDA, what Megatron-Core 0.16 needs to run on gloo.

`without_cuda()` does nothing where CUDA is present. Nothing in it touches numerics: it answers questions such as "which
device?" that Megatron-Core asks of torch.cuda. Each piece names the place that it serves.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from lens_megatron.errors import RunError, UsageError
from lens_megatron.machine import allow_many_sockets
from lens_megatron.mcore.layout import ParallelConfig, check_layout
from lens_megatron.model_spec import ModelSpec
from lens_megatron.precision import whole_products

_CPU = torch.device("cpu")
_START = datetime.timedelta(seconds=1800)  # for all ranks to have started, whatever timeout_s
_prepared = False
_layout: ParallelConfig | None = None


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """device="cuda" literals, .cuda(), pinned memory, and `t.type() == "torch.cuda.FloatTensor"` checks.

    Serves: optimizer/clip_grads.py and distrib_optimizer.py (type checks), param_and_grad_buffer.py (device literals),
    dist_checkpointing (pin_memory, .cuda()), pipeline_parallel/schedules.py (num_tokens on device="cuda").
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _names_cuda(where: Any) -> bool:
    if isinstance(where, str):
        return where.startswith("cuda")
    if isinstance(where, torch.device):
        return where.type == "cuda"
    return isinstance(where, int) and not isinstance(where, bool)


class _NoStream:
    """torch.cuda.Stream and Event where everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self if name == "record_event" else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0


@contextlib.contextmanager
def cuda_literals() -> Iterator[None]:
    """Around calls into Megatron-Core's optimizer, gradient buffers and checkpoints; free where CUDA is present.

    Not around forward and backward: our own modules need no such help, and the mode would double a tiny step's time.
    """
    if torch.cuda.is_available():
        yield
    else:
        with _CudaLiteralsOnCpu():
            yield


def without_cuda() -> None:
    """Let Megatron-Core run on CPU. Called once per process, before any of its modules builds anything."""
    global _prepared
    _repair_missing_transformer_engine()
    if torch.cuda.is_available() or _prepared:
        return
    _prepared = True
    stream = _NoStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,  # used as `device=` all over Megatron-Core
        "synchronize": lambda *args, **kwargs: None,  # p2p_communication.py, timers.py
        "set_device": lambda *args, **kwargs: None,
        "Stream": _NoStream,  # param_and_grad_buffer.py, token_dispatcher.py, cpu offloading
        "Event": _NoStream,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda s=None: contextlib.nullcontext(),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = lambda *args, **kwargs: None  # utils.py: nvtx ranges around every layer
    torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None
    _rng_on_cpu()
    _moe_on_cpu()


def _repair_missing_transformer_engine() -> None:
    """moe_utils.py reads `te_general_gemm`, bound only if transformer_engine imports: a NameError in every router."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _rng_on_cpu() -> None:
    """tensor_parallel/random.py keeps CUDA generator states; here the generator is the CPU's."""
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    class CpuRngTracker(mcore_random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise RuntimeError(f"random state {name!r} or seed {seed} exists already")
            self.seeds_.add(seed)
            before = torch.get_rng_state()
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    mcore_random.CudaRNGStatesTracker = CpuRngTracker
    mcore_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _moe_on_cpu() -> None:
    """moe_utils.py turns all-to-all split sizes into lists only for CUDA tensors; tensors are refused as split sizes."""
    from megatron.core.transformer.moe import token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
    _uneven_parts_on_gloo()


def _uneven_parts_on_gloo() -> None:
    """tensor_parallel/mappings.py gathers and scatters parts of unequal size between the ranks that share an expert; NCCL
    takes them, gloo wants all alike."""
    from megatron.core.tensor_parallel import mappings

    gather_even, scatter_even = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(part: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather_even(part, group, output_split_sizes, use_global_buffer)
        padded = part.new_zeros((max(output_split_sizes), *part.shape[1:]))
        padded[: part.size(0)] = part
        parts = [torch.empty_like(padded) for _ in range(group.size())]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter(whole: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter_even(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        dist.all_reduce(total, group=group)
        return total.split(list(input_split_sizes))[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


def world_size_from_environment() -> int | None:
    """Number of processes when torchrun, srun or our own launcher started this one; None when nobody did."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ and "RANK" in os.environ else None


def initialize(spec: ModelSpec, layout: ParallelConfig, seed: int = 0, timeout_s: float = 600.0) -> None:
    """Join the other processes and build Megatron-Core's groups. The layout is checked first."""
    world_size = world_size_from_environment() or 1
    check_layout(spec, layout, world_size)
    timeout = datetime.timedelta(seconds=timeout_s)
    allow_many_sockets()
    whole_products()
    check_gpus()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if world_size == 1:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        else:
            store, rank = _meet(world_size)
            store.set_timeout(timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    without_cuda()
    set_layout(layout, seed, timeout_s)


def check_gpus() -> None:
    """Every rank must see all GPUs of its node, and one for each of its ranks. All ranks say so: none waits for the others."""
    if not torch.cuda.is_available():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks, seen = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), torch.cuda.device_count()
    if ranks <= seen:
        return
    what = f"{ranks} ranks on this node, and each sees {seen} GPU{'s' * (seen > 1)}"
    if any(name in os.environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")):
        raise UsageError(
            f"{what}: by --gpus-per-task or --gpu-bind Slurm shows each task its own alone, but a rank takes the GPU of its "
            f"number on the node: ask with --gpus-per-node={ranks} instead, without the others"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    because = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    raise UsageError(f"{what}{because}: start one a GPU, and let every rank see all GPUs of the node")


def _meet(world_size: int) -> tuple[Any, int]:
    """The store of all ranks, once all have come: rank 0 reads its data first, and that has its own time."""
    store, rank, _ = next(dist.rendezvous("env://", timeout=_START))  # type: ignore[attr-defined]
    signs = [f"lens/here/{other}" for other in range(world_size)]
    store.set(signs[rank], "1")
    try:
        store.wait(signs, _START)
    except dist.DistStoreError:
        missing = [str(other) for other, sign in enumerate(signs) if not store.check([sign])]
        if not missing:
            raise
        which = f"rank{'s' * (len(missing) > 1)} {', '.join(missing[:8])}{', ...' * (len(missing) > 8)}"
        raise RunError(
            f"{which} of {world_size} had not started after {_START.total_seconds():.0f} s: "
            "see what became of them in their logs"
        ) from None
    return store, rank


def set_layout(layout: ParallelConfig, seed: int = 0, timeout_s: float = 600.0) -> None:
    """Megatron-Core's groups for `layout`; those of the same layout are kept, those of another one replaced."""
    global _layout
    from megatron.core import parallel_state, tensor_parallel

    if _layout == layout:
        return
    _leave_groups()
    _layout = layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
    )
    with cuda_literals():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _leave_groups() -> None:
    """Megatron-Core forgets its groups without closing them; each keeps threads and sockets of gloo alive."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    for group in parallel_state._global_process_group_list or ():
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Where an error is on its way, groups of GPUs are left to the end of the process, which breaks off what they do: closing
    one waits for operations that the others never begin, and nobody would hear of the error."""
    global _layout
    if torch.cuda.is_available() and sys.exc_info()[0] is not None:
        return
    _leave_groups()
    _layout = None
    if dist.is_initialized():
        dist.destroy_process_group()
