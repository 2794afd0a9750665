"""The fake device. `load()` comes before anything imports torch, `start()` after. Both are for good: a process of its own.

FakeTensorMode, torch's own, gives tensors a shape, a type and a device. Beside it Megatron-Core and we ask torch.cuda which
device there is, and torch.distributed for process groups: the answers are those of rank `rank` in a world of one H200 each.

A number that is read from the device is 0. Each reading is counted: on a real GPU the host waits there for all before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import traceback
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NAME = "NVIDIA H200"


def load() -> None:
    """Build the answers that torch's C++ asks for (seconds, once a version of torch) and put them before torch."""
    if "torch" in sys.modules:
        raise RuntimeError("benchmarks.fake_cuda.device.load() must come before anything imports torch")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    torch_folder = Path(spec.origin).parent
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise RuntimeError("this torch is a CUDA build, whose device cannot be replaced: use a CPU build")
    for name in (*(path.name for path in (torch_folder / "lib").glob("libgomp*")), "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_built(torch_folder)))
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what torch.compile fuses, fused.py says


def _built(torch_folder: Path) -> Path:
    source = Path(__file__).with_name("device.cpp")
    version = (torch_folder / "version.py").read_text().split("__version__ = ")[1].split()[0].strip("'\"")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lens-megatron"
    library = cache / f"fake_cuda-{version}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", "-o", str(partial)]
        command += [str(source), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        partial.rename(library)
    return library


class _Stream:
    """torch.cuda.Stream and Event: all is done at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self if name == "record_event" else None


class _Generator:
    """torch.cuda's random states; nothing here draws."""

    def __init__(self) -> None:
        import torch

        self.state = torch.zeros(16, dtype=torch.uint8)

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state

    def clone_state(self) -> Any:
        return self

    graphsafe_get_state = clone_state

    def graphsafe_set_state(self, state: Any) -> None:
        pass


class _Done:
    def wait(self, *args: Any) -> None:
        pass


@cache
def start(rank: int = 0, world: int = 1) -> tuple[Any, Counter[str]]:
    """The mode under which tensors live on the device, and the places in the source that read a number from it, counted."""
    import torch
    from torch._subclasses import fake_impls, fake_tensor

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    _answer_for_cuda()
    _answer_for_groups(rank, world)
    fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # no numbers behind small tensors: to move one would move it to a real device
    torch._C._set_only_lift_cpu_tensors(True)
    waits: Counter[str] = Counter()
    last: list[Any] = []  # a weak reference: another storage may come to lie where this one was

    def read(mode: Any, function: Any, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and not (last and last[0]() is storage):  # tolist() reads one after another
            waits[place()] += 1
        last[:] = [weakref.ref(storage)]
        return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0

    fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = read
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # it would repeat an answer of exchange.py's for another pack
    return mode, waits


def place() -> str:
    """The line of ours or of Megatron-Core's that is running."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("lens_megatron", "megatron"):
            parts = Path(frame.filename).parts
            if package in parts:
                return "/".join(parts[parts.index(package) :]) + f": {frame.line}"
    return "elsewhere"


def _answer_for_cuda() -> None:
    import torch

    device = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=143_771 * 1024**2, multi_processor_count=132)
    stream, generator = _Stream(), _Generator()
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *a: None,
        "get_device_capability": lambda *a: (9, 0),
        "get_device_properties": lambda *a: device,
        "get_device_name": lambda *a: NAME,
        "is_bf16_supported": lambda *a, **k: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0,
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": lambda *a, **k: stream,
        "default_stream": lambda *a, **k: stream,
        "stream": lambda *a: contextlib.nullcontext(),
        "default_generators": (generator,),
        "manual_seed": lambda *a: None,
        "manual_seed_all": lambda *a: None,
        "get_rng_state": lambda *a, **k: generator.get_state(),
        "set_rng_state": lambda *a, **k: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getDevice = lambda: 0
    kind = torch.Tensor.type

    def named(tensor: Any, *args: Any, **kwargs: Any) -> Any:  # Megatron-Core compares it with "torch.cuda.FloatTensor"
        found = kind(tensor, *args, **kwargs)
        said = not isinstance(found, str) or ".cuda." in found  # some fakes say it
        return found if said or not tensor.is_cuda else found.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # type: ignore[method-assign,assignment]
    torch.nn.Module._apply = _moved  # type: ignore[method-assign]


def _moved(module: Any, function: Any, recurse: bool = True) -> Any:
    """Module.cuda() and the like: torch's own swaps tensors in place, which fakes do not allow."""
    import torch

    for child in module.children():
        child._apply(function)
    for tensors in (module._parameters, module._buffers):
        for name, old in tensors.items():
            if old is None:
                continue
            new = function(old.detach())
            if new.device == old.device and new.dtype == old.dtype:
                continue
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, old.requires_grad)
                marks = {key: value for key, value in vars(old).items() if key not in vars(new)}
                vars(new).update(marks)  # such as sequence_parallel
            tensors[name] = new
    return module


def _answer_for_groups(rank: int, world: int) -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lens_megatron.mcore import runtime

    join, group = dist.init_process_group, dist.new_group
    dist.init_process_group = lambda *a, **k: join("fake", store=FakeStore(), rank=rank, world_size=world)
    dist.new_group = lambda *a, **k: group(*a, **{**k, "backend": "fake", "pg_options": None})
    runtime._meet = lambda size: (SimpleNamespace(set_timeout=lambda *a: None), rank)  # type: ignore[assignment]
    collectives = (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "broadcast",
        "barrier",
    )
    for name in (*collectives, "all_to_all_single", "_all_gather_base", "_reduce_scatter_base"):
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, lambda *a, **k: _Done())

    def all_the_same(answers: list[Any], mine: Any, group: Any = None) -> None:
        answers[:] = [mine] * len(answers)

    dist.all_gather_object = all_the_same  # type: ignore[assignment]
    dist.broadcast_object_list = lambda *a, **k: None
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer.dist_all_gather_func = param_and_grad_buffer.dist_reduce_scatter_func = lambda *a, **k: (
        _Done()
    )
    param_and_grad_buffer._coalescing_manager = lambda *a, **k: contextlib.nullcontext(_Done())
