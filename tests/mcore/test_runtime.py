"""What a process sets up for itself before it joins the others."""

from __future__ import annotations

import datetime
import os
import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from lens_megatron.errors import RunError, UsageError
from lens_megatron.machine import _SOCKETS, allow_many_sockets
from lens_megatron.mcore import runtime


def test_as_many_sockets_as_the_system_allows() -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        allow_many_sockets()
        allowed = _SOCKETS if most == resource.RLIM_INFINITY else min(most, _SOCKETS)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


@pytest.mark.parametrize(
    ("environment", "seen", "words"),
    [
        ({}, 1, []),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 4, []),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, 8, []),  # the others are the servers'
        # rank 0, which has the one GPU that it takes, must not wait for those that have ended
        (
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"},
            1,
            ["4 ranks on this node, and each sees 1 GPU:", "--gpus-per-task", "--gpus-per-node=4"],
        ),
        ({"LOCAL_RANK": "3", "SLURM_TRES_PER_TASK": "gres/gpu:1"}, 1, ["4 ranks", "--gpus-per-task"]),
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "2,3"},
            2,
            ["4 ranks on this node, and each sees 2 GPUs (CUDA_VISIBLE_DEVICES=2,3): start one a GPU"],
        ),
    ],
)
def test_a_gpu_for_every_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], seen: int, words: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not words:
        runtime.check_gpus()
        return
    with pytest.raises(UsageError) as said:
        runtime.check_gpus()
    assert all(word in str(said.value) for word in words), said.value


def test_fp32_is_multiplied_as_fp32_in_nvidias_containers_too() -> None:
    code = """
import torch
from lens_megatron.mcore import runtime
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import load_model_spec
before = torch.get_float32_matmul_precision()
runtime.initialize(load_model_spec("tiny-qwen3"), ParallelConfig())
print(before, torch.get_float32_matmul_precision())
"""
    theirs = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=theirs, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["high", "highest"]


def test_ranks_that_never_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    store.set("lens/here/2", "1")
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 4)]))
    monkeypatch.setattr(runtime, "_START", datetime.timedelta(seconds=1))
    with pytest.raises(RunError, match="ranks 1, 3 of 4 had not started after 1 s: see what became of them"):
        runtime._meet(4)


def test_of_gpus_no_group_is_closed_while_an_error_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for operations that the other ranks never begin, and the error would not be heard."""
    closed: list[str] = []
    monkeypatch.setattr(runtime, "_leave_groups", lambda: closed.append("groups"))
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: False)

    def fails() -> None:
        try:
            raise RunError("out of memory")
        finally:
            runtime.shutdown()

    for there, seen in ((True, []), (False, ["groups"])):
        closed.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(RunError):
            fails()
        assert closed == seen
        runtime.shutdown()  # as a run that ended well
        assert closed == [*seen, "groups"]
