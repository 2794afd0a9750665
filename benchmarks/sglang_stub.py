"""A STUB of an SGLang server: the same HTTP schema and no model behind it. For the client's cost and for faults.

python -m benchmarks.sglang_stub --port 0      prints its port on one line, then serves until it is killed

Tokens are arithmetic on the prompt, log-probs are made up, time is slept. tests/sglang holds it against the real server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CONTEXT = 10**6
FAULTS = (
    "none",
    "not_json",
    "wrong_id",
    "missing_logprob",
    "nan",
    "too_long",
    "wrong_version",
    "error_500",
    "error_400",
    "first_dropped",
    "no_success",
    "stuck_by_group",
)


@dataclass
class Request:
    """`sampled` of its tokens by `since`, under the versions of `spans`; aborts and pauses wake it."""

    body: dict[str, Any]
    since: float | None = None  # it waits for a slot
    sampled: int = 0
    spans: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Stub:
    def __init__(
        self,
        version: str,
        token_seconds: float,
        slots: int,
        api_key: str,
        fault: str,
        vocab: int,
        kv_tokens: int = 10**8,
    ) -> None:
        self.version, self.token_seconds, self.slots = version, token_seconds, slots
        self.api_key, self.fault, self.vocab, self.kv_tokens = api_key, fault, vocab, kv_tokens
        self.weight_version, self.in_session, self.finished_tokens = "default", False, 0
        self.update_seconds = 0.0  # that it takes over new weights
        self.stages = 1
        self.stuck = False  # a broadcast that failed is for ever under way on its GPU
        self.arguments: dict[str, Any] = {}  # that it tells it was started with
        self.groups: set[str] = set()  # for weights
        self.scrambled = 0  # times
        self.released: set[str] = set()  # kinds of memory
        self.running: dict[str, Request] = {}
        self.in_cache = True  # what runs; not while it is retracted
        self.going_on = asyncio.Event()
        self.going_on.set()
        self.admitted = asyncio.Semaphore(slots)

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.authorised], client_max_size=2**34)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/server_info", self.server_info),
                web.get("/model_info", self.model_info),
                web.get("/v1/loads", self.loads),
                web.post("/generate", self.generate),
                web.post("/abort_request", self.abort),
                web.post("/pause_generation", self.pause),
                web.post("/continue_generation", self.go_on),
                web.post("/flush_cache", self.flush),
                web.post("/begin_weight_update", self.begin),
                web.post("/end_weight_update", self.end),
                web.post("/update_weights_from_disk", self.update),
                web.post("/update_weights_from_tensor", self.update_in_session),
                web.post("/update_weights_from_distributed", self.update_in_session),
                web.post("/init_weights_update_group", self.init_group),
                web.post("/destroy_weights_update_group", self.destroy_group),
                web.post("/weights_checker", self.scramble),
                web.post("/update_weight_version", self.rename),
                web.post("/release_memory_occupation", self.release_memory),
                web.post("/resume_memory_occupation", self.resume_memory),
            ]
        )
        return app

    @web.middleware
    async def authorised(self, request: web.Request, handler: Any) -> web.StreamResponse:
        open_to_all = request.path.startswith("/health") or not self.api_key
        if not open_to_all and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.stuck and (request.path == "/flush_cache" or request.path.startswith("/update_weights_from")):
            await asyncio.Event().wait()
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        await self.going_on.wait()  # nor does the real one answer while it is paused
        return web.Response()

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": self.version,
                "dtype": "float32",
                "device": "cpu",
                "internal_states": [{}],
                "tp_size": 1,
                "dp_size": 1,
                "pp_size": self.stages,
                "max_running_requests": self.slots,
                "context_length": CONTEXT,
                "max_total_num_tokens": self.kv_tokens,
                "stub_groups": sorted(self.groups),
                "stub_scrambled": self.scrambled,
                "stub_released": sorted(self.released),
                **self.arguments,
            }
        )

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": "stub", "is_generation": True, "weight_version": self.weight_version})

    async def loads(self, request: web.Request) -> web.Response:
        running = min(len(self.running), self.slots)
        used = self.finished_tokens + sum(self._done(item) for item in self.running.values())
        row = {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": len(self.running) - running,
            "num_used_tokens": used,
            "max_running_requests": self.slots,
        }
        return web.json_response({"version": self.version, "loads": [row]})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.fault == "error_500":
            return web.json_response({"error": {"message": "made-up failure"}}, status=500)
        if self.fault == "error_400":
            return web.json_response({"error": {"message": "made-up refusal"}}, status=400)
        await self.going_on.wait()
        assert not self.released, "nothing can be generated without memory"
        item = self.running[body["rid"]] = Request(body)
        try:
            async with self.admitted:
                wanted = self._wanted(body)
                while not item.aborted and item.sampled < wanted:
                    item.woken.clear()
                    if not self.going_on.is_set():
                        await item.woken.wait()
                        continue
                    item.since = time.monotonic()
                    try:
                        await asyncio.wait_for(item.woken.wait(), (wanted - item.sampled) * self.token_seconds)
                    except asyncio.TimeoutError:
                        self._note(item, wanted)
                count = item.sampled
                reason: dict[str, Any] = {"type": "length", "length": wanted}
                if item.aborted:
                    reason = {"type": "abort", "message": "Aborted"}
        finally:
            self.running.pop(body["rid"], None)
        if self.fault == "first_dropped" and self.finished_tokens == 0 and request.transport is not None:
            request.transport.close()
        self.finished_tokens += count
        return self._answer(body, count, reason, item.spans)

    def _done(self, item: Request) -> int:
        if self.token_seconds == 0 or item.since is None or not self.going_on.is_set():
            return item.sampled
        more = int((time.monotonic() - item.since) / self.token_seconds)
        return min(item.sampled + more, self._wanted(item.body))

    def _note(self, item: Request, count: int) -> None:
        """The tokens up to `count` are of the weights that it has now."""
        if count > item.sampled:
            item.spans.append({"version": self.weight_version, "start": item.sampled, "end": count})
            item.sampled = count

    def _wanted(self, body: dict[str, Any]) -> int:
        """Cut without a word, as by the real one."""
        room = min(CONTEXT, self.kv_tokens) - 2 - len(body["input_ids"])
        return int(min(body["sampling_params"]["max_new_tokens"], room))

    def _answer(
        self, body: dict[str, Any], count: int, reason: dict[str, Any], spans: list[dict[str, Any]]
    ) -> web.Response:
        prompt = body["input_ids"]
        tokens = [(prompt[-1] + 7 * place) % self.vocab for place in range(count)]
        triples: list[list[Any]] = [
            [-1.6094379425048828 - place % 97 / 64, token, None] for place, token in enumerate(tokens)
        ]
        meta: dict[str, Any] = {
            "id": body["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(prompt),
            "weight_version": self.weight_version,
            "num_retractions": 0,
            "output_token_logprobs": triples,
            "completion_tokens": count,
            "cached_tokens": 0,
            "weight_versions": spans,
            "e2e_latency": 0.0,
        }
        if body.get("logprob_start_len") == 0:
            meta["input_token_logprobs"] = [[None if place == 0 else -2.0, t, None] for place, t in enumerate(prompt)]
        if self.fault == "wrong_id":
            meta["id"] = "somebody-else"
        elif self.fault == "missing_logprob":
            triples.pop()
        elif self.fault == "nan":
            triples[0][0] = float("nan")
        elif self.fault == "too_long":
            tokens.append(1)
            triples.append([-1.0, 1, None])
            meta["completion_tokens"] = meta["weight_versions"][0]["end"] = len(tokens)
        elif self.fault == "wrong_version":
            meta["weight_version"] = meta["weight_versions"][0]["version"] = "somebody-elses"
        text = (
            "<html>gateway</html>"
            if self.fault == "not_json"
            else json.dumps({"output_ids": tokens, "meta_info": meta})
        )
        return web.Response(text=text, content_type="application/json")

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        for name, item in self.running.items():
            if body.get("rid") and name.startswith(body["rid"]):
                self._abort(item)
        return web.Response()

    def _abort(self, item: Request) -> None:
        self._note(item, self._done(item))
        item.aborted = True
        item.woken.set()

    async def pause(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", "abort")
        for item in self.running.values():
            if mode == "abort":
                self._abort(item)
            else:
                self._note(item, self._done(item))
                item.woken.set()
        self.going_on.clear()
        self.in_cache = mode != "retract"
        return web.json_response({"status": "ok", "message": "Generation paused successfully."})

    async def go_on(self, request: web.Request) -> web.Response:
        self.in_cache = True
        self.going_on.set()
        for item in self.running.values():
            item.woken.set()
        return web.json_response({"status": "ok", "message": "Generation continued successfully."})

    async def flush(self, request: web.Request) -> web.Response:
        patience = time.monotonic() + float(request.query.get("timeout", 0))
        while self.running and time.monotonic() < patience:  # what was retracted counts here, too
            await asyncio.sleep(0.01)
        idle = not (self.running and self.in_cache)
        return web.Response(text="Cache flushed.\n" if idle else "Flush cache failed.\n", status=200 if idle else 400)

    async def begin(self, request: web.Request) -> web.Response:
        return self._session(not self.in_session, True)

    async def end(self, request: web.Request) -> web.Response:
        return self._session(self.in_session, False)

    def _session(self, fits: bool, then: bool) -> web.Response:
        if fits:
            self.in_session = then
        return _success(fits, "ok" if fits else "the session is in another state")

    async def update(self, request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(self.update_seconds)
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        return _success(True, "Succeeded to update model weights.")

    async def update_in_session(self, request: web.Request) -> web.Response:
        if not self.in_session:
            return _success(False, "weight update outside a session")
        return await self.update(request)

    async def scramble(self, request: web.Request) -> web.Response:
        asked = (await request.json())["action"] == "reset_tensors"
        self.scrambled += asked
        return _success(asked, "ok" if asked else "there are no weights to look at")

    async def init_group(self, request: web.Request) -> web.Response:
        self.stuck = self.fault == "stuck_by_group"
        if self.stuck:
            return _success(False, "a stub joins no group")
        self.groups.add((await request.json())["group_name"])
        return _success(True, "Succeeded to initialize custom process group.")

    async def destroy_group(self, request: web.Request) -> web.Response:
        name = (await request.json())["group_name"]
        known = name in self.groups
        self.groups.discard(name)
        return _success(known, "ok" if known else "The group to be destroyed does not exist.")

    async def release_memory(self, request: web.Request) -> web.Response:
        assert not self.running, "the real server dies of it when it is not idle"
        self.released |= set((await request.json())["tags"])
        return web.Response(text="null")

    async def resume_memory(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if not tags <= self.released:
            os._exit(1)  # like the real one
        self.released -= tags
        return web.Response(text="null")

    async def rename(self, request: web.Request) -> web.Response:
        if self.fault == "no_success":
            return web.json_response({"success": False, "message": "made-up"})
        self.weight_version = (await request.json())["new_version"]
        return _success(True, f"Weight version updated to {self.weight_version}")


def _success(yes: bool, message: str) -> web.Response:
    return web.json_response({"success": yes, "message": message}, status=200 if yes else 400)


async def serve(stub: Stub, port: int) -> None:
    runner = web.AppRunner(stub.application(), access_log=None, keepalive_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--version", default="0.5.21")
    parser.add_argument("--token-seconds", type=float, default=0.001)
    parser.add_argument("--update-seconds", type=float, default=0.0)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--api-key", default="")  # a stub guards nothing
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--fault", choices=FAULTS, default="none")
    parser.add_argument("--kv-tokens", type=int, default=10**8)
    parser.add_argument("--vocab", type=int, default=50000)
    parser.add_argument("--arguments", type=json.loads, default={})
    args = parser.parse_args(arguments)

    async def run() -> None:
        stub = Stub(args.version, args.token_seconds, args.slots, args.api_key, args.fault, args.vocab, args.kv_tokens)
        stub.update_seconds, stub.stages, stub.arguments = args.update_seconds, args.pp, args.arguments
        await serve(stub, args.port)

    asyncio.run(run())


if __name__ == "__main__":
    main(sys.argv[1:])
