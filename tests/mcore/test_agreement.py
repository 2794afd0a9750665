"""Whose failure an error tells of."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lens_megatron.mcore.agreement import is_of_transport

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1000, {}, NCCL version 2.28.9\n{}\nLast error:\n{}"


@pytest.mark.parametrize(
    "error, others",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:1234"), True),
        (dist.DistNetworkError("The client socket has failed to connect to [node1]:29500"), True),
        (
            dist.DistBackendError(
                NCCL.format(
                    "remote process exited or there was a network error", "ncclRemoteError: ...", "socketProgress"
                )
            ),
            True,
        ),
        (
            dist.DistBackendError(
                NCCL.format("unhandled cuda error", "ncclUnhandledCudaError: ...", "Cuda failure 2 'out of memory'")
            ),
            False,
        ),
        (
            dist.DistBackendError(
                NCCL.format("invalid usage", "ncclInvalidUsage: ...", "Duplicate GPU detected : rank 1 and rank 0")
            ),
            False,
        ),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_what_tells_of_another_rank_leaves_the_word_to_it(error: Exception, others: bool) -> None:
    assert is_of_transport(error) is others
