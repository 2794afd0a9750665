"""The supervisor of a node and the trainer's side of it, with a server that answers like any HTTP server."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launchers import supervisor
from lens_megatron import workers
from lens_megatron.rollout import sglang_server, sglang_supervised
from lens_megatron.rollout.sglang_config import ServerConfig
from lens_megatron.rollout.sglang_server import server_processes
from lens_megatron.rollout.sglang_supervised import FOLDER, SupervisedServer

SERVER = """
import http.server, json, sys
path = sys.argv[sys.argv.index("--config") + 1]
assert path.endswith((".yaml", ".yml")), "as SGLang does"
settings = json.load(open(path))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers["Authorization"] == "Bearer " + settings["api-key"]
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"base": settings["base-gpu-id"]}).encode())
http.server.HTTPServer((settings["host"], settings["port"]), Answer).serve_forever()
"""


def until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def answer(server: SupervisedServer, key: str) -> str:
    request = urllib.request.Request(server.url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return str(reply.read().decode())


def answers(server: SupervisedServer) -> bool:
    try:
        return bool(answer(server, server.api_key))
    except OSError:
        return False


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SupervisedServer]]:
    """Two servers of two GPUs each on one node."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "servers"))
    (tmp_path / "stub.py").write_text(SERVER)
    end = tmp_path / "end"
    command = [
        sys.executable,
        "-S",
        supervisor.__file__,
        str(tmp_path / "servers"),
        str(end),
        "--count=2",
        "--per-node=2",
    ]
    running = subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": "0"})
    config = ServerConfig(command=(sys.executable, str(tmp_path / "stub.py")), tp=2, start_timeout_s=30.0)
    made = server_processes(config, 2, "model", tmp_path / "logs", 0, {}, kind=SupervisedServer)
    try:
        yield [server for server in made if isinstance(server, SupervisedServer)]
    finally:
        end.touch()
        try:
            assert running.wait(20.0) == 0
        finally:
            running.kill()


def test_started_restarted_and_ended(servers: list[SupervisedServer], tmp_path: Path) -> None:
    for place, server in enumerate(servers):
        server.start()
        until(lambda server=server: answers(server))
        assert answer(server, server.api_key) == f'{{"base": {2 * place}}}'
        assert not server.has_ended
    first, second = servers
    assert first.url != second.url
    with pytest.raises(OSError, match="401"):
        answer(first, "a guess")
    before, processes = first.url, ours(tmp_path)
    assert len(processes) == 2
    for process in processes:
        assert first.api_key not in " ".join(process.cmdline())
    victim = next(p for p in processes if "sglang_0" in " ".join(p.cmdline()))
    victim.send_signal(signal.SIGKILL)
    until(lambda: first.has_ended)
    assert first.exit_code == -signal.SIGKILL and not second.has_ended
    first.start()
    until(lambda: answers(first))
    assert first.url != before and answers(second)
    second.stop()
    until(lambda: len(ours(tmp_path)) == 1)
    for path in (tmp_path / "servers").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert (tmp_path / "logs" / "sglang_0.log").read_text().count("--- start") == 2


def test_nobody_outlives_the_supervisor(servers: list[SupervisedServer], tmp_path: Path) -> None:
    servers[0].start()
    until(lambda: answers(servers[0]))
    (tmp_path / "end").touch()
    until(lambda: not ours(tmp_path))


def test_a_server_that_cannot_be_started_says_so(tmp_path: Path, servers: list[SupervisedServer]) -> None:
    config = ServerConfig(command=("/no/such/program",), start_timeout_s=30.0)
    (server, _) = server_processes(config, 2, "model", tmp_path / "logs", 0, {}, kind=SupervisedServer)
    server.start()
    assert server.has_ended and "/no/such/program cannot be started" in server.last_words()


def ours(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder / "stub.py") in (p.info["cmdline"] or [])]


def test_names_of_nodes() -> None:
    assert supervisor.names_of_node(0, 3, 2, 1) == [("sglang_0", 0, 0), ("sglang_1", 1, 0)]
    assert supervisor.names_of_node(1, 3, 2, 1) == [("sglang_2", 0, 0)]
    assert [supervisor.names_of_node(node, 2, 1, 2) for node in range(4)] == [
        [("sglang_0", 0, 0)],
        [("sglang_0", 0, 1)],
        [("sglang_1", 0, 0)],
        [("sglang_1", 0, 1)],
    ]


def test_what_starts_the_trainers_ranks_is_kept_from_servers_on_both_sides() -> None:
    """With torch's own names: a server that saw one would wait for the trainer's store instead of opening its own."""
    from torch.distributed.elastic.agent.server import local_elastic_agent

    source = Path(local_elastic_agent.__file__).read_text()
    start = source.index("worker_env = {")
    of_torchrun = set(re.findall(r'^ +"(\w+)":', source[start : source.index("}", start)], re.MULTILINE))
    assert {"RANK", "TORCHELASTIC_USE_AGENT_STORE"} < of_torchrun
    kept = {"PATH", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "HF_HOME"}
    environment = dict.fromkeys(of_torchrun | kept | {"LENS_MEGATRON_STARTED_BY", workers.MEETING}, "1")
    for inherited in (supervisor.inherited, sglang_server.inherited):
        assert set(inherited(environment, "10.0.0.7")) == kept | {"no_proxy", "NO_PROXY"}
        for given in ("no_proxy", "NO_PROXY"):
            proxied = inherited({"http_proxy": "http://proxy:3128", given: ".corp,10.1.0.0/16"}, "10.0.0.7")
            assert proxied["no_proxy"] == proxied["NO_PROXY"] == ".corp,10.1.0.0/16,10.0.0.7,localhost"


def test_ports_are_none_of_those_that_the_system_hands_out() -> None:
    """On Linux's own settings; a server binds its port long after."""
    for _ in range(20):
        assert sglang_server.free_port("127.0.0.1") < 32_000 > supervisor.free_port("127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", supervisor.free_port("127.0.0.1")))
        port = taken.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(supervisor.random.SystemRandom, "sample", lambda self, ports, count: [port - 7, port + 1])
            assert supervisor.free_port("127.0.0.1", 8) == port + 1


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_text("{}")
    read, stale = Path.read_text, [OSError(errno.ESTALE, "Stale file handle")]

    def stale_at_first(path: Path, *args: Any, **named: Any) -> str:
        if stale:
            raise stale.pop()
        return read(path, *args, **named)

    monkeypatch.setattr(Path, "read_text", stale_at_first)
    assert sglang_supervised._text(tmp_path / "state") == "{}"
    assert sglang_supervised._text(tmp_path / "no state") is None
    server = supervisor.Server("sglang_0", tmp_path, 0, 0, 1)
    stale.append(OSError(errno.ESTALE, "Stale file handle"))
    assert server._read("state") is None and server._read("state") == {}
