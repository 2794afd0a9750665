"""`lens-megatron serve`."""

from __future__ import annotations

import argparse
import contextlib
import signal
from pathlib import Path

SUMMARY = "start SGLang servers of a model and keep them running until Ctrl-C"
EXAMPLE = "lens-megatron serve qwen3-8b-base --servers 2 --port 30000 tp=4 args.mem_fraction_static=0.8"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a shipped name, an HF folder or a cached hub id")
    parser.add_argument("--servers", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--port", type=int, metavar="P", help="of the first, then P+1 and so on (default: free ones)")
    parser.add_argument("--dir", default="runs/serve", metavar="D", help="for logs and the key (default runs/serve)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of rollout.server, e.g. tp=4 python=/opt/sglang/bin/python",
    )


def run(args: argparse.Namespace) -> int:
    from lens_megatron import strict
    from lens_megatron.errors import UsageError
    from lens_megatron.model_spec import find_weights
    from lens_megatron.rollout.sglang_config import ServerConfig
    from lens_megatron.serve import serve

    if args.servers < 1:
        raise UsageError(f"--servers is at least 1 (got {args.servers})")
    if args.port is not None and not 0 < args.port <= 65536 - args.servers:
        raise UsageError(f"--port {args.port}: {args.servers} ports from there on must be below 65536")
    config = strict.build(ServerConfig, strict.apply_overrides({}, args.overrides), "serve")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler ends it like Ctrl-C does
    with contextlib.suppress(KeyboardInterrupt):
        serve(find_weights(args.model).absolute(), Path(args.dir).absolute(), config, args.servers, args.port)
    return 0
