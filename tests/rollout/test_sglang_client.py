"""The client against the stub server: what it asks, what it refuses, and how it ends. tests/sglang has the real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout import sglang_client
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import Refused, SGLangClient, Unreachable
from lens_megatron.rollout.sglang_schema import (
    IN_PLACE_ARGUMENTS,
    BadAnswer,
    parse_generation,
    parse_version,
    stale_in_place,
    untold_experts,
)
from lens_megatron.routed_experts import Routers


@contextlib.contextmanager
def stub_server(*options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.sglang_stub", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def connect(loop: EventLoop) -> Iterator[Callable[..., SGLangClient]]:
    made: list[SGLangClient] = []

    def connect(url: str, **options: Any) -> SGLangClient:
        made.append(SGLangClient(url, **options))
        return made[-1]

    yield connect
    for client in made:
        loop.run(client.close())


def test_verbs_and_an_update_in_order(loop: EventLoop, connect: Callable[..., SGLangClient]) -> None:
    with stub_server("--api-key", "secret") as url:
        server = connect(url, api_key="secret")
        assert loop.run(server.server_info()).has_sessions
        assert loop.run(server.weight_version()) == "default"
        answer = loop.run(server.generate("a", (5, 6), 9))
        assert len(answer.tokens) == 9 and answer.finish == "length" and answer.versions == (("default", 0, 9),)
        with pytest.raises(Refused, match="outside a session"):
            loop.run(server.update_weights_from_tensor([b"AAAA", b"BBBB"], "1"))
        loop.run(server.pause_generation("abort"))
        loop.run(server.flush_cache())
        loop.run(server.begin_weight_update())
        loop.run(server.update_weights_from_tensor([b"A" * 3 * 2**20], "1"))
        loop.run(server.update_weights_from_distributed(["a"], ["bfloat16"], [[2, 3]], "g", "1", "flattened_bucket"))
        loop.run(server.end_weight_update())
        loop.run(server.continue_generation())
        assert loop.run(server.prompt_logprobs("b", (5, 6, 7))) == ((-2.0, -2.0), "1")
        with pytest.raises(Refused, match=r"401.*Unauthorized"):
            loop.run(connect(url).weight_version())


def test_an_abort_gives_the_part_so_far(loop: EventLoop, connect: Callable[..., SGLangClient]) -> None:
    with stub_server("--token-seconds", "0.01") as url:
        server = connect(url)
        running = loop.start(server.generate("one/", (5,), 10_000))
        time.sleep(0.3)
        with pytest.raises(Refused, match=r"flush_cache, tried for 1\.5 s"):
            loop.run(server.flush_cache(timeout_s=1.5))
        loop.run(server.abort_request("one/"))
        answer = running.result(5)
        assert answer.finish == "abort" and 0 < len(answer.tokens) < 10_000


def test_a_server_that_does_not_answer_is_given_up_in_time(
    loop: EventLoop, connect: Callable[..., SGLangClient]
) -> None:
    with stub_server("--token-seconds", "10") as url:
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"no answer within 0\.5 s"):
            loop.run(connect(url).generate("a", (5,), 10, timeout_s=0.5))
        assert time.monotonic() - began < 3
        lost = connect(url)
        running = loop.start(lost.generate("b", (5,), 10))
        time.sleep(0.3)
    with pytest.raises(Unreachable, match="/generate"):
        running.result(5)
    with pytest.raises(Unreachable, match="Cannot connect"):
        loop.run(lost.weight_version())


def test_a_node_that_answers_nothing_is_told_from_a_slow_server(
    loop: EventLoop, connect: Callable[..., SGLangClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full backlog drops what asks for a connection, as a dead node does: the request may go to another server."""
    monkeypatch.setattr(sglang_client, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as dead, contextlib.ExitStack() as crowd:
        for _ in range(8):
            one = crowd.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(dead.getsockname())
        time.sleep(0.1)
        with pytest.raises(Unreachable, match=r"no connection within 0\.3 s") as error:
            loop.run(connect(f"http://127.0.0.1:{dead.getsockname()[1]}").generate("a", (5,), 10, timeout_s=5))
    assert not error.value.timed_out


@pytest.mark.parametrize(
    "fault, says",
    [
        ("not_json", "no JSON"),
        ("wrong_id", "answered as 'somebody-else'"),
        ("missing_logprob", "other tokens than output_ids"),
        ("nan", "no finite number"),
        ("too_long", "10 tokens, 9 were asked for"),
        ("error_500", r"refused \(500\): made-up failure"),
        ("error_400", r"refused \(400\): made-up refusal"),
    ],
)
def test_garbage_is_refused_in_one_line(
    fault: str, says: str, loop: EventLoop, connect: Callable[..., SGLangClient]
) -> None:
    with stub_server("--fault", fault) as url:
        with pytest.raises(RunError, match=says) as caught:
            loop.run(connect(url).generate("a", (5,), 9))
        assert url in str(caught.value) and "\n" not in str(caught.value)


def answer(**changes: Any) -> dict[str, Any]:
    meta = {
        "id": "a",
        "finish_reason": {"type": "stop", "matched": 3},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "weight_version": "1",
        "weight_versions": [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}],
        "output_token_logprobs": [[-0.5, 9, None], [-0.25, 3, None]],
    }
    return {"output_ids": changes.pop("output_ids", [9, 3]), "meta_info": {**meta, **changes}}


def test_versions_are_kept_by_token() -> None:
    parsed = parse_generation(answer(), "a", (5, 6), 4, (3,), False)
    assert parsed.versions == (("0", 0, 1), ("1", 1, 2)) and parsed.logprobs == (-0.5, -0.25)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "b"},
        {"output_ids": [9, 4]},
        {"output_ids": None},
        {"prompt_tokens": 3},
        {"completion_tokens": 3},
        {"finish_reason": None},
        {"finish_reason": {"type": "timeout"}},
        {"finish_reason": {"type": "length"}},  # two tokens of four
        {"finish_reason": {"type": "stop"}, "output_ids": [9, 8], "output_token_logprobs": [[-1.0, 9], [-1.0, 8]]},
        {"output_token_logprobs": [[0.5, 9, None], [-0.25, 3, None]]},
        {"output_token_logprobs": [[None, 9, None], [-0.25, 3, None]]},
        {"output_token_logprobs": [["-0.5", 9, None], [-0.25, 3, None]]},
        {"output_token_logprobs": [[float("-inf"), 9, None], [-0.25, 3, None]]},
        {"output_token_logprobs": [[-0.5], [-0.25, 3, None]]},
        {"output_token_logprobs": None},
        {"weight_version": None},
        {"weight_versions": [{"version": "0", "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 0, "end": 2}]},
        {"weight_versions": [{"version": 0, "start": 0, "end": 2}]},
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadAnswer):
        parse_generation(answer(**changes), "a", (5, 6), 4, (3,), False)


def test_an_abort_before_the_first_token_is_empty() -> None:
    meta = {"id": "a", "finish_reason": {"type": "abort"}, "weight_version": "1", "completion_tokens": 0}
    parsed = parse_generation({"output_ids": [], "meta_info": meta}, "a", (5, 6), 4, (), False)
    assert parsed.finish == "abort" and parsed.tokens == ()


def encoded(experts: list[list[int]]) -> str:
    return base64.b64encode(np.array(experts, np.int32).tobytes()).decode()


ROUTERS = Routers(layers=2, experts=301, topk=2)
EXPERTS = [[0, 7, 3, 2], [1, 2, 4, 5], [300, 0, 6, 1]]  # two layers of two, for prompt and response but the last token


def test_experts_are_kept_a_row_a_token() -> None:
    parsed = parse_generation(answer(routed_experts=encoded(EXPERTS)), "a", (5, 6), 4, (3,), False, ROUTERS)
    assert parsed.routing is not None
    assert parsed.routing.experts().tolist() == EXPERTS
    unasked = parse_generation(answer(routed_experts=encoded(EXPERTS)), "a", (5, 6), 4, (3,), False)
    assert unasked.routing is None


@pytest.mark.parametrize(
    "experts, says",
    [
        (None, "start the server with --enable-return-routed-experts"),
        (encoded(EXPERTS[:2]), "not those of 3 tokens|a token, and"),
        (encoded([*EXPERTS, *EXPERTS]), "8 a token, and 2 layers x 2"),
        (encoded([*EXPERTS[:2], [1, 2, 3, -1]]), "not of 0 to 300"),
        (encoded([*EXPERTS[:2], [1, 2, 3, 301]]), "not of 0 to 300"),
        (encoded([*EXPERTS[:2], [1, 2, 4, 4]]), "twice in a layer"),
        ("", "0 a token"),
        ("AAA", "not those of 3 tokens"),
        ([1, 2], "not those of 3 tokens"),
    ],
)
def test_experts_that_cannot_be_replayed_are_refused(experts: Any, says: str) -> None:
    with pytest.raises(BadAnswer, match=says):
        parse_generation(answer(routed_experts=experts), "a", (5, 6), 4, (3,), False, ROUTERS)


@pytest.mark.parametrize(
    "server, says",
    [
        ({}, "--enable-return-routed-experts"),
        ({"enable_return_routed_experts": False}, "--enable-return-routed-experts"),
        ({"enable_return_routed_experts": True, "pp_size": 2}, "pp_size above 1"),
        ({"enable_return_routed_experts": True, "enable_hierarchical_cache": True}, "enable_hierarchical_cache"),
        ({"enable_return_routed_experts": True, "speculative_algorithm": "EAGLE"}, "speculative_algorithm"),
        ({"enable_return_routed_experts": True, "disaggregation_mode": "decode"}, "disaggregation_mode"),
        ({"enable_return_routed_experts": True, "moe_runner_backend": "flashinfer_trtllm"}, "flashinfer_trtllm"),
        ({"enable_return_routed_experts": True, "pp_size": 1, "disaggregation_mode": "null"}, None),
        ({"enable_return_routed_experts": True, "moe_runner_backend": "auto"}, None),
    ],
)
def test_servers_that_would_tell_no_experts_or_wrong_ones(server: dict[str, Any], says: str | None) -> None:
    found = untold_experts(server)
    assert found is None if says is None else found is not None and says in found


@pytest.mark.parametrize(
    "server, says",
    [
        ({}, "--disable-radix-cache"),
        ({"disable_radix_cache": True, "disable_overlap_schedule": False}, "--disable-overlap-schedule"),
        ({**IN_PLACE_ARGUMENTS, "pp_size": 2}, "pp_size above 1"),
        ({**IN_PLACE_ARGUMENTS, "pp_size": 1}, None),
    ],
)
def test_servers_that_would_go_on_with_old_weights(server: dict[str, Any], says: str | None) -> None:
    found = stale_in_place(server)
    assert found is None if says is None else found is not None and says in found


def test_an_abort_may_come_without_experts() -> None:
    """What goes on from there is read once more, and its experts are told from the start."""
    meta = {"finish_reason": {"type": "abort"}}
    assert parse_generation(answer(**meta), "a", (5, 6), 4, (3,), False, ROUTERS).routing is None
    told = parse_generation(answer(**meta, routed_experts=encoded(EXPERTS)), "a", (5, 6), 4, (3,), False, ROUTERS)
    assert told.routing is not None and len(told.routing.experts()) == 3


def test_versions_of_the_server() -> None:
    assert parse_version("0.5.15.post1") == (0, 5, 15) and parse_version("0.5.21rc2") == (0, 5, 21)
    with pytest.raises(BadAnswer):
        parse_version(None)


def test_closing_the_loop_ends_what_runs() -> None:
    loop = EventLoop()
    sleeping = loop.start(asyncio.sleep(1000))
    loop.close()
    assert sleeping.cancelled()
