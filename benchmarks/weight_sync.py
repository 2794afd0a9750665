"""How fast weights reach a real SGLang server, by each transport, against a plain copy of the same bytes in the same run.

    python -m benchmarks.weight_sync [--mib 512] [--rounds 3] [--out benchmarks/results/weight_sync.json]

    distributed   against a gloo broadcast of the same bytes, in the same buckets, to a process that throws them away
    tensor        by shared memory, to a server that this machine's run started; against a loopback POST of the same bytes to
                  a server that throws them away
    tensor_body   in the body of the request, as to any other server; against the same POST
    disk          against writing and reading a file of the same bytes

Checksums (which servers have on CPU only) and scrambling are off; the ledger's fingerprints are on. Needs the
CPU environment of SGLang (`make test-sglang` builds it). What a GPU would do is not measured here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from benchmarks._machine import machine

QWEN3_8B_BYTES = 2 * 8_190_735_360  # bf16
PUBLISHED = "2.2-39 s"  # for Qwen3-8B, full and as a delta, on GPUs
BUCKET_MIB = 256.0
TRANSPORTS = ("distributed", "tensor", "tensor_body", "disk")
TARGETS = {"distributed": 0.8, "tensor": 0.5}


def write_model(folder: Path, mib: int) -> None:
    """A random Qwen3 of about `mib` MiB in bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers = max(1, round((mib * 2**20 / 2 - 2 * 8192 * 1024) / 15.7e6))
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def bucket_sizes(total: int) -> list[int]:
    most = int(BUCKET_MIB * 2**20)
    return [most] * (total // most) + ([total % most] if total % most else [])


def _receive(port: int, sizes: list[int], rounds: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2, timeout=limit)
    for _ in range(rounds):
        for size in sizes:
            dist.broadcast(torch.empty(size, dtype=torch.uint8), src=0)
        dist.barrier()


def plain_broadcast(total: int, rounds: int) -> list[float]:
    """In a process of its own, so that the trainer's process groups are not touched."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    sender = context.Process(target=_broadcast, args=(total, rounds, results))
    sender.start()
    seconds: list[float] = results.get(timeout=600)
    sender.join()
    return seconds


def _broadcast(total: int, rounds: int, results: Any) -> None:
    import socket

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sizes = bucket_sizes(total)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    receiver = multiprocessing.get_context("spawn").Process(target=_receive, args=(port, sizes, rounds))
    receiver.start()
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2, timeout=limit)
    buffer_B = torch.ones(max(sizes), dtype=torch.uint8)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for size in sizes:
            dist.broadcast(buffer_B[:size], src=0)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    results.put(seconds)
    receiver.join()


class _Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # http.server's name
        left = int(self.headers["Content-Length"])
        room = memoryview(bytearray(2**20))
        while left:
            left -= self.rfile.readinto(room[: min(left, len(room))])
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


def _sink(ports: Any) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Sink)
    ports.put(server.server_port)
    server.serve_forever()


def plain_post(total: int, rounds: int) -> list[float]:
    """With the client that the tensor transport uses."""
    from lens_megatron.rollout.event_loop import EventLoop
    from lens_megatron.rollout.sglang_client import SGLangClient

    context = multiprocessing.get_context("spawn")
    ports: Any = context.Queue()
    sink = context.Process(target=_sink, args=(ports,), daemon=True)
    sink.start()
    loop = EventLoop()
    client = SGLangClient(f"http://127.0.0.1:{ports.get(timeout=60)}")
    bodies = {size: bytes(size) for size in set(bucket_sizes(total))}
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for size in bucket_sizes(total):
            loop.run(client._send("POST", "/", [bodies[size]], 300.0))
        seconds.append(time.perf_counter() - began)
    loop.run(client.close())
    loop.close()
    sink.terminate()
    sink.join()
    return seconds


def plain_file(total: int, rounds: int, folder: Path) -> list[float]:
    piece = memoryview(bytearray(os.urandom(2**20)) * 16)
    seconds = []
    for _ in range(rounds):
        path = folder / "plain"
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for start in range(0, total, len(piece)):
                file.write(piece[: min(len(piece), total - start)])
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
        seconds.append(time.perf_counter() - began)
        path.unlink()
    return seconds


class _Driver:
    """Of the rollout driver what a sync needs."""

    address: Any = None

    def servers(self) -> list[Any]:
        return [self.address]

    def begin_update(self, version: int) -> None: ...

    def end_update(self, synced: Any, label: str) -> None: ...

    def restart_servers(self, silent: Any, reason: str) -> bool:
        return False


def transports(
    model: Path, folder: Path, server: Any, rounds: int, names: Sequence[str] = TRANSPORTS
) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the model, and the seconds that each transport took from the first gathered tensor to the last answer."""
    import torch

    from lens_megatron.mcore import runtime
    from lens_megatron.mcore.layout import ParallelConfig
    from lens_megatron.mcore.step import build_frozen
    from lens_megatron.model_spec import load_model_spec
    from lens_megatron.rollout.sglang_server import ServerAddress
    from lens_megatron.rollout.weight_sync.config import SyncConfig
    from lens_megatron.rollout.weight_sync.sync import WeightSync
    from lens_megatron.rollout.weight_sync.transports import make_transports

    torch.set_num_threads(1)
    spec = load_model_spec(str(model))
    runtime.initialize(spec, ParallelConfig())
    policy = build_frozen(spec, ParallelConfig(), model, dtype=torch.bfloat16)
    driver = _Driver()
    seconds: dict[str, list[float]] = {}
    total = version = 0
    for name in names:
        driver.address = ServerAddress(
            server.name, server.url, server.api_key, server.starts, shares_memory=name != "tensor_body"
        )
        settings = SyncConfig(
            transport=name.removesuffix("_body"),  # type: ignore[arg-type]
            fallback="none",
            bucket_mib=BUCKET_MIB,
            scramble=False,
            checksums=False,
        )
        sync = WeightSync(
            settings, policy, make_transports(settings, folder, model, "cpu"), list(range(5, 60)), driver, None
        )
        seconds[name] = []
        for _ in range(rounds + 1):
            version += 1
            synced = sync.sync(version)
            assert synced is not None
            total = synced.bytes
            seconds[name].append(synced.transfer_seconds)
        seconds[name] = seconds[name][1:]  # the first one also builds groups and buffers
        sync.close()
    runtime.shutdown()
    return total, seconds


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of weights, in bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    from tests.sglang.server import cpu_config, servers

    with tempfile.TemporaryDirectory(prefix="weight-sync-") as name:
        folder = Path(name)
        write_model(folder / "model", options.mib)
        room = {"max_total_tokens": 1024, "max_running_requests": 2, "mem_fraction_static": 0.5}
        config = cpu_config(args={"dtype": "bfloat16", **room})
        with servers(folder / "model", folder, config=config) as (server,):
            total, seconds = transports(folder / "model", folder, server, options.rounds, options.transports)
        posted = plain_post(total, options.rounds)
        plain = {
            "distributed": plain_broadcast(total, options.rounds),
            "tensor": posted,
            "tensor_body": posted,
            "disk": plain_file(total, options.rounds, folder),
        }
    rows = {name: _row(total, seconds[name], plain[name], TARGETS.get(name)) for name in seconds}
    result = {"machine": machine(), "bytes": total, "bucket_mib": BUCKET_MIB, "rounds": options.rounds, "rows": rows}
    _print(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _row(total: int, seconds: list[float], plain: list[float], target: float | None) -> dict[str, Any]:
    """By the medians."""
    speed, plain_speed = total / statistics.median(seconds) / 1e9, total / statistics.median(plain) / 1e9
    return {
        "gb_per_s": speed,
        "plain_gb_per_s": plain_speed,
        "share": speed / plain_speed,
        "target": target,
        "seconds": seconds,
        "plain_seconds": plain,
        "qwen3_8b_seconds": QWEN3_8B_BYTES / speed / 1e9,
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['bytes'] / 2**20:.0f} MiB in buckets of {BUCKET_MIB:.0f} MiB, medians of {result['rounds']}")
    print(
        f"{'':12} {'GB/s':>7} {'plain':>7} {'share':>6} {'target':>6}   Qwen3-8B at this rate (published: {PUBLISHED})"
    )
    for name, row in result["rows"].items():
        target = f"{row['target']:.0%}" if row["target"] else "-"
        print(
            f"{name:12} {row['gb_per_s']:7.2f} {row['plain_gb_per_s']:7.2f} {row['share']:6.0%} {target:>6}"
            f"   {row['qwen3_8b_seconds']:.1f} s"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
