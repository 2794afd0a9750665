"""Behind SGLang's own router: rollouts through it, weights and questions past it. The workers are stubs, whose answers
tests/sglang/test_conformance.py holds against the real server's."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_server import free_port
from tests.rollout.test_sglang_engine import Stub, check, drain, engine_of, requests, stubs, sync

from . import venv

pytestmark = pytest.mark.sglang


@contextlib.contextmanager
def router(workers: Sequence[Stub], log: Path) -> Iterator[str]:
    port = free_port("127.0.0.1")
    command = [str(venv.build()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(free_port("127.0.0.1")), "--worker-urls"]
    environment = {**os.environ, "PYTHONPATH": str(venv.build_router())}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *(worker.url for worker in workers)],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"{url}/readiness"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_rollouts_through_the_router_come_back_once(tmp_path: Path) -> None:
    with (
        stubs(["--token-seconds", "0.005"], ["--token-seconds", "0.005"]) as two,
        router(two, tmp_path / "router.log") as url,
        engine_of(two, router=url) as engine,
    ):
        wanted = requests(60)
        engine.submit(wanted)
        check(drain(engine, 60), wanted)
        long = requests(6, 4000)
        engine.submit([*long])
        time.sleep(0.5)
        engine.abort([request.id for request in long])  # at whichever worker has it
        began = time.monotonic()
        assert {finished.finish for finished in drain(engine, 6).values()} == {"abort"}
        assert time.monotonic() - began < 5
        with pytest.raises(RunError, match="did not reach every server behind the router"):
            sync(engine, 4, count=1)


def test_a_worker_that_dies_behind_the_router_loses_nothing(tmp_path: Path) -> None:
    with (
        stubs(["--token-seconds", "0.02"], ["--token-seconds", "0.02"]) as two,
        router(two, tmp_path / "router.log") as url,
        engine_of(two, router=url) as engine,
    ):
        wanted = requests(40)
        engine.submit(wanted)
        time.sleep(0.4)
        two[0].process.kill()
        check(drain(engine, 40, 60.0), wanted)
