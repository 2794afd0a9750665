"""What the client takes for granted of SGLang, asked of the real server; its stub must answer the same way."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient
from lens_megatron.rollout.sglang_server import UNSYNCED, ServerProcess
from tests.rollout import tiny

from .conftest import save_tiny
from .server import LONGEST, UNDER_WAY, UNDER_WAY_AND_AWAITED

pytestmark = pytest.mark.sglang
PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model(0, tied=False)


@torch.no_grad()
def logprobs(net: Any, tokens: tuple[int, ...], temperature: float = 1.0) -> list[float]:
    """Of tokens[1:], by the HF model."""
    scores = (net(torch.tensor([tokens])).logits[0].double() / temperature).log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(tokens[1:])]


async def _sampling(server: SGLangClient) -> None:
    """Until tokens are seen to come: a server may take a moment to begin."""
    seen: set[int] = set()
    deadline = time.monotonic() + 30
    while len(seen) < 4:
        assert time.monotonic() < deadline, f"it samples nothing: {seen}"
        seen.add((await server.load()).used_tokens)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_logprobs_are_of_the_whole_vocabulary_at_the_sampling_temperature(
    temperature: float, top_p: float, client: SGLangClient, loop: EventLoop, net: Any
) -> None:
    answer = loop.run(client.generate(f"t{temperature}p{top_p}/", PROMPT, 40, temperature=temperature, top_p=top_p))
    assert len(answer.tokens) == 40 and answer.finish == "length"
    expected = logprobs(net, PROMPT + answer.tokens, temperature or 1.0)[len(PROMPT) - 1 :]
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(expected), atol=1e-4, rtol=0)
    assert answer.version == UNSYNCED and answer.versions == ((UNSYNCED, 0, 40),)


def test_a_stop_token_ends_the_response_and_is_part_of_it(client: SGLangClient, loop: EventLoop) -> None:
    stop = tuple(range(20, 40))
    answer = loop.run(client.generate("stop/", PROMPT, 200, stop=stop))
    assert answer.finish == "stop" and answer.tokens[-1] in stop
    assert not set(answer.tokens[:-1]) & set(stop)


def test_prompt_logprobs_are_at_temperature_one_and_past_the_cache(
    client: SGLangClient, loop: EventLoop, net: Any
) -> None:
    tokens = tuple(range(4, 44))
    for _ in range(2):  # the second time from a warm cache
        given, version = loop.run(client.prompt_logprobs(f"probe{time.monotonic_ns()}/", tokens))
        torch.testing.assert_close(torch.tensor(given), torch.tensor(logprobs(net, tokens)), atol=1e-4, rtol=0)
    assert version == UNSYNCED


def test_an_aborted_request_comes_back_with_its_part(client: SGLangClient, loop: EventLoop, net: Any) -> None:
    one = loop.start(client.generate("abort/1/", PROMPT, UNDER_WAY))
    other = loop.start(client.generate("abort/10/", PROMPT, 30))
    loop.run(_sampling(client))
    loop.run(client.abort_request("abort/1/"))
    answer = one.result(20)
    assert answer.finish == "abort" and len(answer.tokens) < UNDER_WAY
    expected = logprobs(net, PROMPT + answer.tokens)[len(PROMPT) - 1 :]
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(expected), atol=1e-4, rtol=0)
    assert other.result(20).finish == "length"  # its id begins like the aborted one's, but for the slash
    loop.run(client.abort_request("abort/1/"))  # of nothing


def test_a_request_that_waits_is_aborted_too(client: SGLangClient, loop: EventLoop) -> None:
    """max_running_requests is 16; what waits has no tokens yet."""
    running = [loop.start(client.generate(f"full/{i:03d}/", PROMPT, UNDER_WAY)) for i in range(24)]
    loop.run(_sampling(client))
    load = loop.run(client.load())
    assert load.most_running == 16
    for i in reversed(range(24)):  # those that wait first
        loop.run(client.abort_request(f"full/{i:03d}/"))
    answers = [future.result(30) for future in running]
    assert {answer.finish for answer in answers} == {"abort"}
    assert min(len(answer.tokens) for answer in answers) == 0


def test_the_load_moves_while_tokens_are_sampled(client: SGLangClient, loop: EventLoop) -> None:
    running = loop.start(client.generate("load/", PROMPT, 400))
    seen = set()
    while not running.done():
        load = loop.run(client.load())
        seen.add(load.used_tokens)
        time.sleep(0.02)
    assert len(seen) > 3


def test_wrong_requests_are_refused_with_a_reason(client: SGLangClient, loop: EventLoop) -> None:
    with pytest.raises(Refused, match=r"\(400\).*context length"):
        loop.run(client.generate("long/", PROMPT, LONGEST))
    with pytest.raises(Refused, match=r"\(400\)"):
        loop.run(client.generate("cold/", PROMPT, 5, temperature=-1.0))
    with pytest.raises(Refused, match=r"\(401\)"):
        loop.run(_with_key(client.url, "guessed"))


async def _with_key(url: str, key: str | None) -> None:
    stranger = SGLangClient(url, key)
    try:
        await stranger.pause_generation("abort")
    finally:
        await stranger.close()


def test_the_key_is_on_no_command_line(real_server: ServerProcess) -> None:
    processes = [process for process in psutil.process_iter() if _belongs(process, real_server)]
    assert len(processes) >= 3
    for process in processes:
        assert real_server.api_key not in " ".join(process.cmdline())
    for file in (real_server.log, real_server.log.with_suffix(".yaml")):
        assert file.stat().st_mode & 0o077 == 0


def _belongs(process: psutil.Process, server: ServerProcess) -> bool:
    try:
        return any(
            str(server.log.with_suffix("")) in word for p in [process, *process.parents()] for word in p.cmdline()
        )
    except psutil.Error:
        return False


def test_the_dance_of_an_update(
    client: SGLangClient, loop: EventLoop, tiny_folder: Any, tmp_path: Any, net: Any
) -> None:
    """In mode retract a response goes on with the new weights, and says which tokens are whose."""
    other = tiny.model(1, tied=False)
    save_tiny(1, tmp_path)
    assert loop.run(client.server_info()).has_sessions
    with pytest.raises(Refused, match=r"\(400\)"):
        loop.run(client.update_weights_from_tensor([b"gASVAAAA"], "9"))
    running = loop.start(client.generate("dance/", PROMPT, UNDER_WAY_AND_AWAITED))
    loop.run(_sampling(client))
    try:
        loop.run(client.pause_generation("retract"))
        loop.run(client.flush_cache())
        loop.run(client.update_weights_from_disk(str(tmp_path), "7"))
        loop.run(client.continue_generation())
        answer = running.result(60)
        (old, first, change), (new, again, end) = answer.versions
        assert (old, new, first, end) == (UNSYNCED, "7", 0, UNDER_WAY_AND_AWAITED) and again == change
        tokens = PROMPT + answer.tokens
        start = len(PROMPT) - 1
        expected = logprobs(net, tokens)[start : start + change] + logprobs(other, tokens)[start + change :]
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(expected), atol=1e-4, rtol=0)
        with pytest.raises(Refused):
            loop.run(client.update_weights_from_disk("/nonexistent", "8"))
        assert loop.run(client.weight_version()) == "7"
    finally:
        loop.run(client.update_weights_from_disk(str(tiny_folder), UNSYNCED))


# the stub, held against the real server


@pytest.fixture(scope="module")
def stub(loop: EventLoop) -> Iterator[SGLangClient]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.sglang_stub",
        "--slots",
        "16",
        "--vocab",
        "60",
        "--token-seconds",
        "0.004",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    client = SGLangClient(f"http://127.0.0.1:{int(process.stdout.readline())}")
    yield client
    loop.run(client.close())
    process.kill()
    process.wait()


def _shape(value: Any) -> Any:
    """Keys and types; of lists the first two members."""
    if isinstance(value, dict):
        return {name: _shape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shape(item) for item in value[:2]]
    return type(value).__name__


def _missing(real: Any, stub: Any, where: str = "") -> list[str]:
    """Where the stub has something that the real server has not, or of another type; `stub_...` is what it tells tests."""
    if isinstance(stub, dict) and isinstance(real, dict):
        told = [name for name in stub if not name.startswith("stub_")]
        return [m for name in told for m in _missing(real.get(name), stub[name], f"{where}.{name}")]
    if isinstance(stub, list) and isinstance(real, list) and len(stub) == len(real):
        return [m for a, b in zip(real, stub, strict=True) for m in _missing(a, b, f"{where}[]")]
    return [] if real == stub else [f"{where}: stub {stub}, real {real}"]


@pytest.mark.parametrize("path", ["/server_info", "/model_info", "/v1/loads?include=core"])
def test_the_stub_reads_like_the_real_server(
    path: str, client: SGLangClient, stub: SGLangClient, loop: EventLoop
) -> None:
    real, made_up = (loop.run(server._json("GET", path, None, 30.0)) for server in (client, stub))
    assert not _missing(_shape(real), _shape(made_up))


@pytest.mark.parametrize("ending", ["length", "abort", "prompt", "retract"])
def test_the_stub_answers_like_the_real_server(
    ending: str, client: SGLangClient, stub: SGLangClient, loop: EventLoop
) -> None:

    async def ask(server: SGLangClient) -> Any:
        length = {"abort": UNDER_WAY, "retract": UNDER_WAY_AND_AWAITED}.get(ending, 4)
        sampling = {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True}
        body = {"rid": f"like/{ending}/", "input_ids": list(PROMPT), "sampling_params": sampling, "return_logprob": True,
                "logprob_start_len": 0 if ending == "prompt" else -1, "stream": False}  # fmt: skip
        asked = asyncio.create_task(server._json("POST", "/generate", json.dumps(body).encode(), 30.0))
        if ending == "abort":
            await _sampling(server)
            await server.abort_request(f"like/{ending}/")
        elif ending == "retract":  # paused in the middle, renamed, and gone on: tokens of two versions
            await _sampling(server)
            await server.pause_generation("retract")
            await server.flush_cache()
            await server.set_weight_version("other")
            assert not (await asyncio.wait([asked], timeout=0.5))[0]
            await server.continue_generation()
        return await asked

    real, made_up = loop.run(ask(client)), loop.run(ask(stub))
    for answer in (real, made_up):
        assert len(answer["meta_info"]["weight_versions"]) == (2 if ending == "retract" else 1)
    # a real reason for an abort and its text are free; everything that the client reads is not
    assert not _missing(_shape(real), _shape(made_up))


@pytest.mark.parametrize(
    "verb", ["begin_twice", "end_without", "tensor_outside", "flush_while_running", "flush_that_drains"]
)
def test_the_stub_refuses_what_the_real_server_refuses(
    verb: str, client: SGLangClient, stub: SGLangClient, loop: EventLoop
) -> None:
    async def ask(server: SGLangClient) -> tuple[int, ...]:
        statuses = []

        async def status(work: Any) -> None:
            try:
                await work
                statuses.append(200)
            except Refused as error:
                statuses.append(error.status)

        if verb == "begin_twice":
            for _ in range(2):
                await status(server.begin_weight_update())
            await status(server.end_weight_update())
        elif verb == "end_without":
            await status(server.end_weight_update())
        elif verb == "tensor_outside":
            await status(server.update_weights_from_tensor([b"gASVAAAA"], None))
        elif verb == "flush_that_drains":  # it waits for what runs, instead of being refused
            running = asyncio.create_task(server.generate("drain/", PROMPT, UNDER_WAY))
            await _sampling(server)
            flushing = asyncio.create_task(status(server.flush_cache(drains=True)))
            await asyncio.sleep(0.3)
            assert not flushing.done()
            await server.abort_request("drain/")
            await asyncio.gather(running, flushing)
        else:
            running = asyncio.create_task(server.generate("flush/", PROMPT, UNDER_WAY))
            await _sampling(server)
            await status(server.flush_cache(timeout_s=0.2))
            await server.abort_request("flush/")
            await running
            await status(server.flush_cache())
        return tuple(statuses)

    assert loop.run(ask(stub)) == loop.run(ask(client))
