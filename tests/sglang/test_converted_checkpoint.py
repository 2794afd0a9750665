"""A folder converted from a training checkpoint, served by the real SGLang as it is: the trainer's log-probs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lens_megatron.cli import main
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from tests.checkpoints_tools import layout_cases as cases
from tests.distributed.pool import WorkerPool
from tests.sglang.server import servers

# of these tiny models; in a prompt SGLang takes it for word 0 (it cuts off ids that stand for images, and one too many)
LAST_WORD = 124
pytestmark = pytest.mark.sglang


def test_a_converted_checkpoint_is_served_as_it_is(hf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    saved, folder = tmp_path / "step_000002", tmp_path / "hf"
    four = WorkerPool(4)
    try:
        _, expected = four.run(cases.trained, hf_folder("qwen3_tied"), saved, ParallelConfig(tp=2, pp=2))[0]
    finally:
        four.close()  # their memory is the server's now
    assert main(["convert", "megatron-to-hf", str(saved), str(folder)]) == 0
    assert sum(LAST_WORD not in sequence for sequence in cases.SEQUENCES) >= 3
    loop = EventLoop()
    with servers(folder, tmp_path / "logs") as (server,):
        client = SGLangClient(server.url, server.api_key, timeout_s=60.0)
        try:
            for number, (sequence, wanted) in enumerate(zip(cases.SEQUENCES, expected, strict=True)):
                tokens = tuple(sequence.tolist())
                if LAST_WORD in tokens:
                    continue
                found, _ = loop.run(client.prompt_logprobs(f"{number}/", tokens))
                torch.testing.assert_close(torch.tensor(found), wanted[1:], atol=1e-4, rtol=0)
        finally:
            loop.run(client.close())
    loop.close()
