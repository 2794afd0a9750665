"""Experts that the real server says its tokens went to, and a run that replays them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import routing_replay
from lens_megatron.cli import main
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_server import ServerProcess
from lens_megatron.routed_experts import Routers
from lens_megatron.run_folder import RunFolder
from tests.loop import runs
from tests.loop.runs import run_tree, train, write_run, write_task
from tests.rollout.test_sglang_client import stub_server

from .server import LONGEST, UNDER_WAY

pytestmark = pytest.mark.sglang
LAYERS, EXPERTS, TOPK = 2, 8, 2
ROUTERS = Routers(LAYERS, EXPERTS, TOPK)
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOPK,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), **MIXTURE, max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def server(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with routing_replay.server_that_tells(task / "model", tmp_path_factory.mktemp("logs"), "float32") as one:
        yield one


@pytest.fixture(scope="module")
def net(task: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(task / "model", dtype=torch.float32).eval()


def experts_of(net: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """The HF model's own, [tokens, layers, K], in ascending order."""
    seen: list[torch.Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _, __, out: seen.append(out[2])) for layer in net.model.layers]
    with torch.no_grad():
        net(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1).sort(-1).values


def test_the_experts_of_every_token_but_the_last(server: ServerProcess, net: Any) -> None:
    """Also of a prompt that is in the server's cache, of the part of an aborted rollout, and of what goes on from it."""
    loop = EventLoop()
    client = SGLangClient(server.url, server.api_key, timeout_s=60.0)

    def check(prompt: tuple[int, ...], answer: Any) -> None:
        assert answer.routing is not None
        found = torch.tensor(answer.routing.experts().reshape(-1, LAYERS, TOPK)).long().sort(-1).values
        assert torch.equal(found, experts_of(net, prompt + answer.tokens)[:-1])

    try:
        prompt = tuple(range(5, 40))
        for turn in range(2):
            check(prompt, loop.run(client.generate(f"whole/{turn}/", prompt, 30, routers=ROUTERS)))
        running = loop.start(client.generate("part/", prompt, UNDER_WAY, routers=ROUTERS))
        while loop.run(client.load()).running == 0:
            pass
        loop.run(client.abort_request("part/"))
        part = running.result(60)
        assert part.finish == "abort" and len(part.tokens) < UNDER_WAY
        check(prompt, part)
        again = prompt + part.tokens
        check(again, loop.run(client.generate("rest/", again, 20, routers=ROUTERS)))
        assert loop.run(client.generate("unasked/", prompt, 5)).routing is None
    finally:
        loop.run(client.close())
        loop.close()


def test_trains_with_the_engines_experts(tmp_path: Path) -> None:
    """In bf16, with many experts: without replay single tokens differ by 1 or more (benchmarks/routing_replay.py)."""
    task = write_task(tmp_path / "task", **routing_replay.MIXTURE)
    with routing_replay.server_that_tells(task / "model", tmp_path / "logs", "bfloat16") as server:
        tree = routing_replay.tree_for(task, tmp_path / "run", server, replay=True, parallel={"ep": 2})
        lines = train(tmp_path, tree)
    for line in lines:
        assert line["logprob_diff_max"] < 0.3
        assert line["sync/probe_diff_max"] < 0.3  # the probe's experts are the server's too
        assert line["grad_norm"] > 0
    assert any(line["purified_ratio"] > 0 for line in lines)


def test_a_server_that_would_not_tell_is_refused_before_any_model_is_built(
    task: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(runs.HERE))  # where the run's reward function is
    with stub_server() as url:
        tree = run_tree(task, tmp_path / "run", steps=1, parallel={"tp": 1})
        tree["rollout"] |= {"engine": "sglang", "server": {"urls": [url]}, "routing_replay": True}
        assert main(["train", str(write_run(tmp_path, tree))]) == 2
    assert "--enable-return-routed-experts" in capfd.readouterr().err
    assert not RunFolder(tmp_path / "run").holds_run()
