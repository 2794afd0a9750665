"""A stranger on the way to a real server: passes everything on, and spoils the answers of chosen paths.

with meddler(server.url) as between:
    between.spoil("/generate", cut, times=3)      # the next three; the server's work is done all the same
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
from aiohttp import web

from lens_megatron.rollout.event_loop import EventLoop

Spoil = Callable[[bytes], Awaitable[bytes]]
_ALL = 10**9


async def page(body: bytes) -> bytes:
    return b"<html><body>It works!</body></html>"


async def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


async def logprob_missing(body: bytes) -> bytes:
    answer = json.loads(body)
    answer["meta_info"]["output_token_logprobs"].pop()
    return json.dumps(answer).encode()


async def another_requests(body: bytes) -> bytes:
    answer = json.loads(body)
    answer["meta_info"]["id"] += "0"
    return json.dumps(answer).encode()


def late(seconds: float) -> Spoil:
    async def wait(body: bytes) -> bytes:
        await asyncio.sleep(seconds)
        return body

    return wait


class Meddler:
    def __init__(self, target: str) -> None:
        self._target, self._loop = target, EventLoop("meddler")
        self._spoils: dict[str, tuple[Spoil, int]] = {}
        self.spoiled = 0
        self.url = self._loop.run(self._serve())

    def spoil(self, path: str, how: Spoil, times: int = _ALL) -> None:
        self._spoils[path] = how, times

    def leave_alone(self) -> None:
        self._spoils = {}

    async def _serve(self) -> str:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=2**34)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _pass_on(self, request: web.Request) -> web.Response:
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        body = await request.read()
        async with self._session.request(
            request.method, self._target + request.path_qs, data=body, headers=headers
        ) as answer:
            text, status = await answer.read(), answer.status
        how, times = self._spoils.get(request.path, (None, 0))
        if how is not None and times > 0:
            self._spoils[request.path] = how, times - 1
            self.spoiled += 1
            text = await how(text)
        return web.Response(body=text, status=status, content_type="application/json")

    def close(self) -> None:
        async def end() -> None:
            await self._runner.cleanup()
            await self._session.close()

        self._loop.run(end())
        self._loop.close()


@contextlib.contextmanager
def meddler(target: str) -> Iterator[Meddler]:
    between = Meddler(target)
    try:
        yield between
    finally:
        between.close()
