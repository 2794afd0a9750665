"""Stands for `python -m sglang.launch_server --config FILE`: a stub server with the port and key of the file."""

import asyncio
import os
import sys
from pathlib import Path

import yaml

from benchmarks.sglang_stub import Stub, serve


async def run() -> None:
    settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    seconds, vocab = float(os.environ["TOKEN_SECONDS"]), int(os.environ.get("VOCAB", "50000"))
    stub = Stub("0.5.21", seconds, 64, settings["api-key"], os.environ.get("FAULT", "none"), vocab)
    stub.weight_version = settings["weight-version"]
    stub.arguments = {name.replace("-", "_"): settings[name] for name in settings if name.startswith("disable-")}
    await asyncio.sleep(float(os.environ.get("START_SECONDS", "0")))  # it loads
    await serve(stub, settings["port"])


if "fail" in sys.argv:
    print("ValueError: made-up reason", file=sys.stderr)
    sys.exit(3)
asyncio.run(run())
