"""Runs once on every node of the SGLang servers of a job: starts what the trainer asks for, and says where it is.

    python supervisor.py FOLDER END --per-node K --nodes-each M

SGLang's own container or environment need not have lens-megatron: this file is copied into the run folder and uses
Python's standard library alone. In FOLDER, for each server: `NAME.request` from the trainer (which start, settings,
command; it holds the key, and only its owner can read it) and `NAME.state` from here (which start, URL, whether it
ended). The file END ends it. lens_megatron/rollout/sglang_supervised.py is the other side.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.2
PORTS = range(16_000, 32_000)  # Linux hands out those from 32768 on
MEETING_PORTS = 16  # of a server over several nodes: with data-parallel attention it takes some after the first, too
GRACE_S = 10.0
# Slurm's and the trainer's: a server that saw them would join the trainer's processes. As in rollout/sglang_server.py, which
# may not be here.
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
                 "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                 "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
NONE_OF_THESE_INHERITED = ("TORCHELASTIC_", "LENS_MEGATRON_")  # how names begin


def inherited(environment: "os._Environ[str] | dict[str, str]", host: str) -> "dict[str, str]":
    """Of a server at `host`: when it is up it asks itself for a token, which is nothing for the cluster's proxy."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in NOT_INHERITED and not name.startswith(NONE_OF_THESE_INHERITED)
    }
    given = kept.get("no_proxy") or kept.get("NO_PROXY")  # whoever reads one does not read the other
    direct = ",".join(filter(None, [given, host, "localhost"]))
    return {**kept, "no_proxy": direct, "NO_PROXY": direct}


def own_address() -> str:
    """The address by which this node reaches the trainer, and is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # a datagram socket sends nothing by this
        return str(probe.getsockname()[0])


def free_port(host: str, in_a_row: int = 1) -> int:
    """The first of some that are free. Below those that the system hands out: a server binds its own minutes later, when it
    has loaded its model."""
    for first in random.SystemRandom().sample(PORTS, 100):
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + in_a_row):
                    probes.enter_context(socket.socket()).bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return first
    raise OSError(errno.EADDRINUSE, f"no {in_a_row} free ports in a row on {host}")


def write_private(path: Path, tree: object) -> None:
    """Whole or not at all, and for its owner alone."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(tree, file)
    partial.replace(path)


class Server:
    """One server, or one node's part of it."""

    def __init__(self, name: str, folder: Path, place: int, part: int, parts: int) -> None:
        """`place`: which of its node's servers it is."""
        self.folder, self.name, self.place, self.part, self.parts = folder, name, place, part, parts
        self.start_number = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.told: dict = {}

    def look(self) -> None:
        request = self._read(f"{self.name}.request")
        if request and request["start"] != self.start_number:
            self.end()
            self.start_number = request["start"]
            if not request["stop"]:
                self._start(request)
        self._tell()

    def _start(self, request: dict) -> None:
        host = own_address()
        settings = dict(request["settings"])
        # nothing but the node knows which GPUs its servers have
        settings["base-gpu-id"] = self.place * request["gpus"]
        if self.parts > 1:
            address = self._meeting_point(host)
            if address is None:
                self.start_number -= 1  # the first part has not said yet where: look again
                return
            settings.update({"nnodes": self.parts, "node-rank": self.part, "dist-init-addr": address})
        settings.update({"host": host, "port": free_port(host)})
        own = self.folder / f"{self.name}.settings.{self.part}.yaml"  # SGLang refuses another ending
        write_private(own, settings)  # JSON is YAML too
        command = [*(request["command"] or [sys.executable, "-m", "sglang.launch_server"]), "--config", str(own)]
        log_path = request["log"] + (f".{self.part}" if self.part else "")
        with os.fdopen(os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            log.write(f"--- start {self.start_number} of {self.name} on {host}:{settings['port']}\n".encode())
            log.flush()
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**inherited(os.environ, host), **request["env"]},
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"Error: {command[0]} cannot be started: {error.strerror}\n".encode())
        self.url = f"http://{host}:{settings['port']}"

    def _meeting_point(self, host: str) -> "str | None":
        name = f"{self.name}.meeting.{self.start_number}"
        if self.part == 0:
            write_private(self.folder / name, {"address": f"{host}:{free_port(host, MEETING_PORTS)}"})
        said = self._read(name)
        return said["address"] if said else None

    def _tell(self) -> None:
        """The first part speaks for the server; another one's end shows in the first part's."""
        if self.part or not self.start_number:
            return
        code = self.process.poll() if self.process is not None else 1
        state = {"start": self.start_number, "url": self.url, "ended": code is not None, "exit_code": code}
        if state != self.told:
            write_private(self.folder / f"{self.name}.state", state)
            self.told = state

    def _read(self, name: str) -> "dict | None":
        try:
            return json.loads((self.folder / name).read_text())
        except OSError as error:  # ESTALE: NFS, of a file that was replaced meanwhile
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return None

    def end(self) -> None:
        if self.process is None:
            return
        for number, seconds in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            try:
                os.killpg(self.process.pid, number)  # all that it started; also when it has ended itself
                self.process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process = None


def names_of_node(node: int, count: int, per_node: int, nodes_each: int) -> "list[tuple[str, int, int]]":
    """Name, place on the node and part, of the servers of one node."""
    if nodes_each > 1:
        return [(f"sglang_{node // nodes_each}", 0, node % nodes_each)]
    numbers = range(node * per_node, min(count, (node + 1) * per_node))
    return [(f"sglang_{number}", place, 0) for place, number in enumerate(numbers)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("end", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--per-node", type=int, default=1)
    parser.add_argument("--nodes-each", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    args.folder.mkdir(parents=True, exist_ok=True)
    names = names_of_node(int(os.environ.get("SLURM_NODEID", "0")), args.count, args.per_node, args.nodes_each)
    servers = [Server(name, args.folder, place, part, args.nodes_each) for name, place, part in names]
    try:
        while not args.end.exists():
            for server in servers:
                server.look()
            time.sleep(POLL_S)
    finally:
        for server in servers:
            server.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
