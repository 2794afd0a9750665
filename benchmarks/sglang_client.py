"""What the SGLang client costs: CPU time of this process for rollouts that a STUB server (another process) makes up.

python -m benchmarks.sglang_client [--in-flight 1024] [--out benchmarks/results/sglang_client.json]

`core_share` is the share of one core for each 1,000 tokens/s, which is CPU seconds for each 1,000 tokens: submitting,
HTTP, JSON, checking every field, giving responses out, and watching the server. Target: below 0.005.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._machine import machine
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_seat import Seat

PROMPT_TOKENS = 512
TARGET = 0.005


def measure(in_flight: int, mean_tokens: int, token_seconds: float, seconds: float) -> dict[str, Any]:
    """Of `seconds` with `in_flight` rollouts of 0.5 to 1.5 times `mean_tokens`, after all have been replaced once."""
    command = [sys.executable, "-m", "benchmarks.sglang_stub", "--slots", str(in_flight)]
    stub = subprocess.Popen([*command, "--token-seconds", str(token_seconds)], stdout=subprocess.PIPE, text=True)
    try:
        assert stub.stdout is not None
        url = f"http://127.0.0.1:{int(stub.stdout.readline())}"
        config = ServerConfig(urls=(url,), start_timeout_s=10.0)
        engine = SGLangEngine([Seat("stub", url, None, None, config)], config)
        engine.begin_update(0)
        _name_weights(url)
        engine.end_update(engine.servers())
        result = _measure(engine, in_flight, mean_tokens, seconds)
        engine.close()
        return result
    finally:
        stub.kill()
        stub.wait()


def _measure(engine: SGLangEngine, in_flight: int, mean_tokens: int, seconds: float) -> dict[str, Any]:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(50000) for _ in range(PROMPT_TOKENS)) for _ in range(64)]  # made beforehand
    count = 0

    def more(number: int) -> None:
        nonlocal count
        requests = []
        for _ in range(number):
            tokens = rng.randint(mean_tokens // 2, 3 * mean_tokens // 2)
            requests.append(Request(str(count), prompts[count % 64], tokens, stop=(50001, 50002), seed=count))
            count += 1
        engine.submit(requests)

    more(in_flight)
    replaced = tokens = rollouts = 0
    cpu = began = 0.0
    while not began or time.monotonic() - began < seconds:
        done = engine.poll(0.1)
        if not began and replaced >= in_flight:
            began, cpu = time.monotonic(), _cpu_seconds()
            tokens = rollouts = 0
        replaced += len(done)
        rollouts += len(done)
        tokens += sum(len(finished.tokens) for finished in done)
        if done:
            more(len(done))
    cpu, wall = _cpu_seconds() - cpu, time.monotonic() - began
    return {
        "in_flight": in_flight,
        "mean_tokens": mean_tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "rollouts": rollouts,
        "tokens_per_s": round(tokens / wall),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "cpu_ms_per_rollout": round(1e3 * cpu / rollouts, 3),
        "core_share": round(1000 * cpu / tokens, 6),
        "target": TARGET,
        "met": 1000 * cpu / tokens < TARGET,
    }


def _cpu_seconds() -> float:
    """Of this process, all its threads; its children (the stub) are another account."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _name_weights(url: str) -> None:
    loop = EventLoop()
    client = SGLangClient(url)
    loop.run(client.set_weight_version("0"))
    loop.run(client.close())
    loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-flight", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", default="benchmarks/results/sglang_client.json")
    args = parser.parse_args()
    results = []
    for mean_tokens in (250, 1000, 4000):
        results.append(measure(args.in_flight, mean_tokens, 10.0 / mean_tokens, args.seconds))
        print(json.dumps(results[-1]), flush=True)
    tree = {"what": "CPU of the client's process; the server is a stub", **machine(), "results": results}
    Path(args.out).write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
