"""Real servers that die, hang or restart while they generate: no rollout is lost or done twice, or the run stops in time
with one line. Late answers and garbage are in test_spoiled_answers.py, syncs in test_weight_sync_faults.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lens_megatron.errors import RunError
from lens_megatron.rollout.engine import Finished, Request
from lens_megatron.rollout.sglang_engine import SGLangEngine
from lens_megatron.rollout.sglang_server import ServerAddress
from tests.rollout import tiny
from tests.rollout.engine_cases import check_response, drain

from .engines import give_weights, load_weights, sglang_engine
from .server import START_SECONDS, cpu_config

pytestmark = pytest.mark.sglang


def rollouts(count: int, tokens: int = 600) -> list[Request]:
    return [Request(f"r{i}", (5 + i % 40, 6, 7), tokens, seed=i) for i in range(count)]


def processes(engine: SGLangEngine, name: str) -> list[psutil.Process]:
    """The guard of a server, and everything below it; the guard first."""
    seat = next(seat for seat in engine._pool.seats if seat.name == name)
    assert seat.process is not None and seat.process._process is not None
    guard = psutil.Process(seat.process._process.pid)
    return [guard, *guard.children(recursive=True)]


def scheduler(engine: SGLangEngine, name: str) -> psutil.Process:
    found = [process for process in processes(engine, name) if "sglang::scheduler" in " ".join(process.cmdline())]
    assert len(found) == 1
    return found[0]


def generating(engine: SGLangEngine) -> None:
    """Waits until every server is at work, and not until it has done it: a quiet machine samples 300 tokens a second."""
    deadline = time.monotonic() + 30
    while any(len(seat.jobs) < 3 for seat in engine._pool.seats):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)


def check_all(wanted: list[Request], done: dict[str, Finished], net: Any, version: int) -> None:
    assert set(done) == {request.id for request in wanted}
    for request in wanted:
        assert done[request.id].finish == "length"
        assert {span.version for span in done[request.id].versions} == {version}
    for request in wanted[::9]:
        check_response(net, request, done[request.id])


@pytest.fixture(scope="module")
def net() -> Any:
    return tiny.model(0, tied=False)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """Two servers that a snapshot brings back; silence is short, so that hangs are noticed within a test."""

    def resync(address: ServerAddress, version: int, label: str) -> None:
        load_weights(address, version, tiny_folder)

    config = cpu_config(silence_s=6.0, restarts=10)
    with sglang_engine(tiny_folder, tmp_path_factory.mktemp("pair"), config, 2, resync) as engine:
        yield engine


@pytest.fixture
def two(pair: SGLangEngine, tiny_folder: Path) -> SGLangEngine:
    """Both ready: one that the test before took down is on its way back."""
    if pair.version < 0:
        give_weights(pair, 0, tiny_folder)
    deadline = time.monotonic() + START_SECONDS
    while len(pair._pool.ready()) < 2:
        assert time.monotonic() < deadline, pair.health()
        time.sleep(0.1)
    return pair


def test_killed_while_it_generates(two: SGLangEngine, net: Any) -> None:
    wanted = rollouts(30)
    two.submit(wanted)
    generating(two)
    killed = processes(two, "sglang_0")
    os.killpg(os.getpgid(killed[1].pid), signal.SIGKILL)
    check_all(wanted, drain(two, 30), net, two.version)
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in killed)


def test_its_scheduler_killed(two: SGLangEngine, net: Any) -> None:
    """The server's own front takes itself down when its scheduler is gone."""
    wanted = rollouts(30)
    two.submit(wanted)
    generating(two)
    scheduler(two, "sglang_1").kill()
    check_all(wanted, drain(two, 30), net, two.version)


def test_its_scheduler_hangs(two: SGLangEngine, net: Any) -> None:
    """Its front goes on answering; only that nothing is sampled tells."""
    wanted = rollouts(30)
    two.submit(wanted)
    generating(two)
    os.kill(scheduler(two, "sglang_0").pid, signal.SIGSTOP)
    began = time.monotonic()
    check_all(wanted, drain(two, 30), net, two.version)
    assert time.monotonic() - began < 50


def test_all_of_it_hangs_and_the_only_other_one_dies(two: SGLangEngine, net: Any) -> None:
    """Nobody is left for a while: the rollouts wait for a server that has been started again and has its weights."""
    wanted = rollouts(20)
    two.submit(wanted)
    generating(two)
    for process in processes(two, "sglang_0")[1:]:
        os.kill(process.pid, signal.SIGSTOP)
    os.killpg(os.getpgid(processes(two, "sglang_1")[1].pid), signal.SIGKILL)
    check_all(wanted, drain_slowly(two, 20), net, two.version)


def drain_slowly(engine: SGLangEngine, count: int) -> dict[str, Finished]:
    """With time for a server to start again."""
    done: dict[str, Finished] = {}
    deadline = time.monotonic() + 240
    while len(done) < count:
        assert time.monotonic() < deadline, engine.health()
        for finished in engine.poll(1.0):
            assert finished.id not in done
            done[finished.id] = finished
    return done


def test_with_no_restart_left_it_stops_in_time_with_one_line_and_leaves_nobody(two: SGLangEngine) -> None:
    """The last test of these servers."""
    everybody = [process for name in ("sglang_0", "sglang_1") for process in processes(two, name)]
    assert len(everybody) >= 8
    two._pool._restarts_left = 0
    two.submit(rollouts(20))
    generating(two)
    for name in ("sglang_0", "sglang_1"):
        os.kill(scheduler(two, name).pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        RunError, match=r"no SGLang server with the weights of version \d+ is left: sglang_0 is gone"
    ) as error:
        drain(two, 20)
    assert time.monotonic() - began < 30 and "\n" not in str(error.value)
    two.close()
    assert not psutil.wait_procs(everybody, timeout=20)[1]
