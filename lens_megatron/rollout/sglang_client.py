"""One SGLang server over HTTP, as typed verbs; sglang itself is never imported.

    loop = EventLoop()                                    # rollout/event_loop.py: a thread for asyncio
    server = SGLangClient("http://127.0.0.1:30000", api_key)
    loop.run(server.flush_cache())                        # waits for the answer
    answer = loop.start(server.update_weights_from_distributed(...))   # a concurrent Future: broadcast, and watch it
    loop.run(gather(*(s.pause_generation("abort") for s in servers)))

Every verb is a coroutine with a time limit (`timeout_s`, by default the client's), to be run in one loop a client. It
ends in one of three errors, all of them RunError:
    Unreachable   no connection, a connection that broke, no answer within the limit: whether it was done is unknown
    Refused       the server answered with another status than 200 (`.status`, `.message`)
    BadAnswer     200, and not what SGLang says in such a case (sglang_schema.py)

Reading: `server_info()` (version, sizes), `weight_version()`, `load()`, `is_healthy()`.
Generating: `generate(...)`, `prompt_logprobs(tokens)` (at temperature 1, for probes), `abort_request(id)`.
Weights, in the order of an update: `pause_generation(mode)`, `flush_cache()` (in mode in_place `flush_cache_if_idle()`),
`begin_weight_update()` where `(await server_info()).has_sessions`, then buckets by `update_weights_from_tensor` or
`update_weights_from_distributed`, or all by `update_weights_from_disk`, `end_weight_update()`, `continue_generation()`.
Groups: `init_weights_update_group`, `destroy_weights_update_group`. Memory: `release_memory_occupation(tags)`,
`resume_memory_occupation(tags)`; resuming a tag that was not released kills the server. `weight_checksums()` fails on CPU.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal

import aiohttp

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_schema import (
    BadAnswer,
    Generation,
    Load,
    ServerInfo,
    parse_generation,
    parse_load,
    parse_server_info,
)
from lens_megatron.routed_experts import Routers

PauseMode = Literal["abort", "retract", "in_place"]
MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
LoadFormat = Literal["flattened_bucket"]

CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 3.0  # below the server's 5 s: a connection that it is about to close is not used again
FLUSH_RETRY_SECONDS = 0.1
DRAIN_SECONDS = 10.0  # a batch takes less
CHUNK_BYTES = 2**20  # of a body that is sent piece by piece


class ServerError(RunError):
    """An SGLang server that did not do what it was asked for."""


class Unreachable(ServerError):
    """No answer; what the server did is unknown. `timed_out`: it took the request and was silent."""

    timed_out = False


class Refused(ServerError):
    """An answer with an error status."""

    def __init__(self, where: str, status: int, message: str) -> None:
        super().__init__(f"{where} was refused ({status}): {message}")
        self.status, self.message = status, message


class SGLangClient:
    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None
        self.unwell: ServerError | None = None  # why `is_healthy` said no last

    # reading

    async def server_info(self, timeout_s: float | None = None) -> ServerInfo:
        return parse_server_info(await self._json("GET", "/server_info", None, timeout_s))

    async def model_info(self, timeout_s: float | None = None) -> Mapping[str, Any]:
        answer = await self._json("GET", "/model_info", None, timeout_s)
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}/model_info: not a mapping")
        return answer

    async def weight_version(self, timeout_s: float | None = None) -> str:
        version = (await self.model_info(timeout_s)).get("weight_version")
        if not isinstance(version, str):
            raise BadAnswer(f"{self.url}/model_info: weight_version is {version!r}")
        return version

    async def load(self, timeout_s: float | None = None) -> Load:
        return parse_load(await self._json("GET", "/v1/loads?include=core", None, timeout_s))

    async def is_healthy(self, timeout_s: float = 30.0) -> bool:
        """Whether its scheduler answers. It takes the server a second or more; never while generation is paused."""
        try:
            await self._send("GET", "/health", None, timeout_s)
        except (Unreachable, Refused) as error:
            self.unwell = error
            return False
        return True

    # generating

    async def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        stop: Sequence[int] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        prompt_logprobs: bool = False,
        routers: Routers | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """One response. An aborted one comes back with `finish == "abort"` and what it had. `routers`: also the experts that
        every token went to, of a server started with enable_return_routed_experts.

        The server aborts by prefix: no `request_id` may begin with another one.
        """
        # every parameter is given: what is left out would be taken from the model's generation_config.json
        sampling: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
        }
        # with ignore_eos stop tokens are ignored as well
        sampling.update({"stop_token_ids": list(stop)} if stop else {"ignore_eos": True})
        if seed is not None:
            sampling["sampling_seed"] = seed
        body: dict[str, Any] = {
            "rid": request_id,
            "input_ids": list(prompt),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": 0 if prompt_logprobs else -1,
            "stream": False,
        }
        if routers is not None:
            body["return_routed_experts"] = True
        answer = await self._json("POST", "/generate", _encoded(body), timeout_s)
        try:
            return parse_generation(answer, request_id, prompt, max_tokens, stop, prompt_logprobs, routers)
        except BadAnswer as error:
            raise BadAnswer(f"{self.url}/{error}") from None

    async def prompt_logprobs(
        self, request_id: str, tokens: Sequence[int], timeout_s: float | None = None
    ) -> tuple[tuple[float, ...], str]:
        """log p(tokens[i] | tokens[:i]) for i >= 1, at temperature 1 and past the prefix cache; and the weight version."""
        answer = await self.probe(request_id, tokens, timeout_s=timeout_s)
        return answer.prompt_logprobs, answer.version

    async def probe(
        self, request_id: str, tokens: Sequence[int], routers: Routers | None = None, timeout_s: float | None = None
    ) -> Generation:
        """What is said of the tokens themselves; one more is sampled because the server must sample some."""
        answer = await self.generate(request_id, tokens, 1, prompt_logprobs=True, routers=routers, timeout_s=timeout_s)
        if answer.finish == "abort":
            raise Unreachable(f"{self.url}/generate: the probe was aborted")
        return answer

    async def abort_request(self, request_id: str, timeout_s: float | None = None) -> None:
        await self._send("POST", "/abort_request", _encoded({"rid": request_id}), timeout_s)

    # weights

    async def pause_generation(self, mode: PauseMode, timeout_s: float | None = None) -> None:
        await self._send("POST", "/pause_generation", _encoded({"mode": mode}), timeout_s)

    async def continue_generation(self, timeout_s: float | None = None) -> None:
        await self._send("POST", "/continue_generation", b"{}", timeout_s)

    async def flush_cache(self, drains: bool = False, timeout_s: float | None = None) -> None:
        """Again and again until the server has done it: it will not while requests run.

        `drains`: nothing waits and nothing new begins, so that each data-parallel rank can be left to wait until its last
        batch is through. Otherwise the first rank answers for all, and one that was not idle yet keeps its cache."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        path = f"/flush_cache?timeout={min(DRAIN_SECONDS, limit / 2):g}" if drains else "/flush_cache"
        while True:
            try:
                await self._send("POST", path, b"", max(0.1, round(deadline - time.monotonic(), 1)))
                return
            except Refused as error:
                if time.monotonic() > deadline:
                    raise Refused(
                        f"{self.url}/flush_cache, tried for {limit:g} s,", error.status, error.message
                    ) from None
            await asyncio.sleep(FLUSH_RETRY_SECONDS)

    async def flush_cache_if_idle(self, timeout_s: float | None = None) -> bool:
        """Whether nothing ran on it, paused requests included, and its cache is empty now."""
        try:
            await self._send("POST", "/flush_cache", b"", timeout_s)
        except Refused as error:
            if error.status != 400:
                raise
            return False
        return True

    async def begin_weight_update(self, timeout_s: float | None = None) -> None:
        await self._succeed("/begin_weight_update", {"selector": "all"}, timeout_s)

    async def end_weight_update(self, timeout_s: float | None = None) -> None:
        await self._succeed("/end_weight_update", {}, timeout_s)

    async def update_weights_from_disk(
        self, folder: str, version: str, flush_cache: bool = True, timeout_s: float | None = None
    ) -> None:
        """All weights of an HF folder that the server can read."""
        body = {"model_path": folder, "weight_version": version, "flush_cache": flush_cache}
        await self._succeed("/update_weights_from_disk", body, timeout_s)

    async def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        version: str | None,
        load_format: LoadFormat | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """A bucket that rank 0 of the group broadcasts meanwhile; dtypes are named like `bfloat16`."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": load_format,
            "flush_cache": False,
            "weight_version": version,
        }
        await self._succeed("/update_weights_from_distributed", body, timeout_s)

    async def update_weights_from_tensor(
        self,
        payloads: Sequence[bytes],
        version: str | None,
        load_format: LoadFormat | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """A bucket; one base64 payload for each tensor-parallel rank of the server."""
        # put together by hand: JSON would look through megabytes of base64 for what needs escaping
        rest = json.dumps({"load_format": load_format, "flush_cache": False, "weight_version": version})
        pieces = [b'{"serialized_named_tensors":[']
        for place, payload in enumerate(payloads):
            pieces += [b',"' if place else b'"', payload, b'"']
        pieces.append(b"]," + rest[1:].encode())
        await self._succeed("/update_weights_from_tensor", pieces, timeout_s)

    async def set_weight_version(self, version: str, timeout_s: float | None = None) -> None:
        """Names the weights that it has, without touching running requests."""
        await self._succeed("/update_weight_version", {"new_version": version, "abort_all_requests": False}, timeout_s)

    async def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: Literal["nccl", "gloo"],
        timeout_s: float | None = None,
    ) -> None:
        """Returns when the whole group has met: start it, and join as rank 0 meanwhile."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._succeed("/init_weights_update_group", body, timeout_s)

    async def destroy_weights_update_group(self, group_name: str, timeout_s: float | None = None) -> None:
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name}, timeout_s)

    async def weight_checksums(self, timeout_s: float | None = None) -> Mapping[str, Any]:
        """What weights_checker answers, as it is."""
        return await self.check_weights("checksum", timeout_s)

    async def check_weights(
        self, action: Literal["checksum", "snapshot", "compare", "reset_tensors"], timeout_s: float | None = None
    ) -> Mapping[str, Any]:
        """Of the server's own tensors. `reset_tensors` makes them random; `compare` holds them against the snapshot."""
        return await self._succeed("/weights_checker", {"action": action}, timeout_s)

    # memory

    async def release_memory_occupation(self, tags: Iterable[MemoryTag], timeout_s: float | None = None) -> None:
        await self._send("POST", "/release_memory_occupation", _encoded({"tags": list(tags)}), timeout_s)

    async def resume_memory_occupation(self, tags: Iterable[MemoryTag], timeout_s: float | None = None) -> None:
        await self._send("POST", "/resume_memory_occupation", _encoded({"tags": list(tags)}), timeout_s)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # HTTP

    async def _succeed(
        self, path: str, body: Mapping[str, Any] | list[bytes], timeout_s: float | None
    ) -> Mapping[str, Any]:
        """Of verbs that say `success`."""
        answer = await self._json("POST", path, body if isinstance(body, list) else _encoded(body), timeout_s)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise BadAnswer(f"{self.url}{path}: 200 without success: {str(answer)[:200]}")
        return answer

    async def _json(self, method: str, path: str, body: bytes | list[bytes] | None, timeout_s: float | None) -> Any:
        text = await self._send(method, path, body, timeout_s)
        try:
            return json.loads(text)
        except ValueError:
            raise BadAnswer(f"{self.url}{path}: 200 with {text[:80]!r}, which is no JSON") from None

    async def _send(self, method: str, path: str, body: bytes | list[bytes] | None, timeout_s: float | None) -> bytes:
        limit = self.timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=limit, sock_connect=min(limit, CONNECT_SECONDS))
        where, headers, data = f"{self.url}{path.partition('?')[0]}", self._headers, body
        if isinstance(body, list):
            headers = {**headers, "Content-Length": str(sum(map(len, body)))}
            data = _chunks(body)  # type: ignore[assignment]
        try:
            async with self._opened().request(
                method, self.url + path, data=data, headers=headers, timeout=timeout
            ) as response:
                text = await response.read()
        except aiohttp.ConnectionTimeoutError:  # a node that is gone answers nothing: the server did nothing either
            raise Unreachable(f"{where}: no connection within {timeout.sock_connect:g} s") from None
        except asyncio.TimeoutError:
            timeout_error = Unreachable(f"{where}: no answer within {limit:g} s")
            timeout_error.timed_out = True
            raise timeout_error from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{where}: {type(error).__name__}: {error}") from None
        if response.status != 200:
            raise Refused(where, response.status, _message(text))
        return text

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # here, because it must be made inside its loop
            # admission is the caller's, so connections are not limited; an answer may be megabytes on one line
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**20, trust_env=False)
        return self._session


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


async def _chunks(pieces: list[bytes]) -> AsyncIterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


def _message(text: bytes) -> str:
    """The server's own words, in one line, wherever it puts them."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return " ".join(str(answer).split())[:500] or "no reason given"
