"""Ranks that wait for rank 0."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lens_megatron.rollout.sglang_server import free_port

# as the command starts: cli.main comes before torch
TWO_RANKS = """
import sys, time
from lens_megatron import cli
cli.main(["--version"])
import torch.distributed as dist
from lens_megatron.errors import RunError
from lens_megatron.mcore import rendezvous
dist.init_process_group("gloo", init_method="tcp://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rendezvous._BEAT_S = 0.2
def work():
    time.sleep(1.0)
    raise RunError("the data is damaged")
try:
    rendezvous.from_rank_zero(work, "read data")
except RunError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("own_value", [None, "WARNING"])
def test_who_waits_for_rank_zero_says_nothing_but_its_error(own_value: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    if own_value is not None:
        environment["TORCH_CPP_LOG_LEVEL"] = own_value
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, address, str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    if own_value is None:
        assert said == ["the data is damaged\n", "rank 0 failed to read data: the data is damaged\n"]
    else:
        assert "waitForInput" in said[1]  # the user's own value stays
