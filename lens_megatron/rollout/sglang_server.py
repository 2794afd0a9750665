"""SGLang servers as processes: started, watched, started again, ended. sglang itself is never imported.

A server's arguments and its key are in a file that its owner alone can read (`logs/sglang_0.yaml`), so that its command
line, which everybody sees, has neither. What it prints is in `logs/sglang_0.log`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lens_megatron.errors import UsageError
from lens_megatron.rollout.engine import derive_seed
from lens_megatron.rollout.sglang_config import ServerConfig

UNSYNCED = "unsynced"  # weight version of a server that no sync has reached since its start
CLOSE_SECONDS = 15.0
_PORTS = range(16_000, 32_000)  # Linux hands out those from 32768 on
# of torchrun, our own launcher and the trainer: a server that saw them would join the trainer's processes, wait for a store
# that somebody else should open, or take the trainer's allocator
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
                  "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                  "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
_NONE_OF_THESE_INHERITED = ("TORCHELASTIC_", "LENS_MEGATRON_")  # how names begin
_ANOTHER_PYTHON = (
    "set rollout.server.python to the python of SGLang's environment "
    "(on Slurm: servers.venv or servers.image of the site)"
)


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is, and which start of it this is: after a restart it is another one, with other weights."""

    name: str
    url: str
    api_key: str | None
    start: int
    version: tuple[int, int, int] = (0, 0, 0)
    tp: int = 1
    dp: int = 1
    pp: int = 1
    shares_memory: bool = False  # with rank 0: a process of the same machine and namespaces


class ServerProcess:
    """One server of this machine."""

    def __init__(
        self,
        name: str,
        config: ServerConfig,
        model: str,
        logs: Path,
        arguments: Mapping[str, Any],
        api_key: str,
        seed: int = 0,
        port: int | None = None,
    ) -> None:
        """`arguments` stand under the config's own; without `port` each start finds a free one."""
        self.name, self._config, self._model, self._seed, self._port = name, config, model, seed, port
        self._arguments = {**arguments, **{key.replace("-", "_"): value for key, value in config.args.items()}}
        self.log, self._settings = logs / f"{name}.log", logs / f"{name}.yaml"
        self.api_key = api_key
        self.starts = 0
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once."""
        self.stop()
        port = self._port or free_port(self._config.host)
        self.url = f"http://{self._config.host}:{port}"
        write_private(self._settings, yaml.safe_dump({**self.settings(), "host": self._config.host, "port": port}))
        environment = {**inherited(os.environ, self._config.host), **self._config.env}
        guard = [sys.executable, "-m", "lens_megatron.rollout.sglang_guard", *self.command()]
        self.log.touch(mode=0o600)
        with self.log.open("ab") as log:
            log.write(f"--- start {self.starts} of {self.name} on {self.url}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    guard, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            except OSError as error:
                raise UsageError(f"rollout.server: {guard[0]} cannot be started ({error.strerror})") from None
        self.starts += 1

    def command(self) -> list[str]:
        own = [self._config.python or sys.executable, "-m", "sglang.launch_server"]
        return [*(self._config.command or own), "--config", str(self._settings)]

    @property
    def shares_memory(self) -> bool:
        """A container's command may give it a /dev/shm of its own."""
        return not self._config.command

    @property
    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def last_words(self) -> str:
        """The line of the log that most likely says why it ended, and what to do about it where that is known."""
        lines = self._lines_of_this_start()
        telling = [line for line in lines if "Error" in line or "error:" in line]
        words = (telling or lines or ["it printed nothing"])[-1].strip()[:300]
        return f"{words}: {_ANOTHER_PYTHON}" if "No module named 'sglang'" in words else words

    def _lines_of_this_start(self) -> list[str]:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return [line for line in text.rpartition("--- start ")[2].splitlines()[1:] if line.strip()]

    def stop(self) -> None:
        """Ends it and everything that it started."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the guard itself hangs
            self._process.wait()
        self._process = None

    def settings(self) -> dict[str, Any]:
        """Of the next start, but for where it listens."""
        config = self._config
        settings = {
            # servers of one seed would give a prompt's rollouts the same random numbers, and so would a second start
            "random_seed": derive_seed(self._seed, self.name, self.starts) % 2**31,
            **self._arguments,
            "model-path": self._model,
            "tp-size": config.tp,
            "ep-size": config.ep,
            "dp-size": config.dp,
            "api-key": self.api_key,
            "weight-version": UNSYNCED,
        }
        return {name.replace("_", "-"): value for name, value in settings.items()}


def inherited(environment: Mapping[str, str], host: str) -> dict[str, str]:
    """Of a server at `host`: when it is up it asks itself for a token, which is nothing for the cluster's proxy."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _NOT_INHERITED and not name.startswith(_NONE_OF_THESE_INHERITED)
    }
    given = kept.get("no_proxy") or kept.get("NO_PROXY")  # whoever reads one does not read the other
    direct = ",".join(filter(None, [given, host, "localhost"]))
    return {**kept, "no_proxy": direct, "NO_PROXY": direct}


def free_port(host: str) -> int:
    """Below those that the system hands out: a server binds its own minutes later, when it has loaded its model."""
    for port in [*random.SystemRandom().sample(_PORTS, 100), 0]:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise UsageError(
                    f"rollout.server.host: {host} is no address of this machine ({error.strerror})"
                ) from None
            return probe.getsockname()[1]
    raise UsageError(f"rollout.server.host: no port of {host} is free")


def server_processes(
    config: ServerConfig,
    count: int,
    model: str,
    logs: Path,
    first_gpu: int,
    common: Mapping[str, Any],
    seed: int = 0,
    first_port: int | None = None,
    kind: type[ServerProcess] | None = None,
) -> list[ServerProcess]:
    """Not started yet, with one key; each on GPUs of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    first, key = config.first_gpu if config.first_gpu is not None else first_gpu, new_api_key()
    on_gpu = config.argument("device") != "cpu"  # there a base_gpu_id would mean another processor socket
    return [
        (kind or ServerProcess)(
            f"sglang_{number}",
            config,
            model,
            logs,
            {**common, **({"base_gpu_id": first + number * config.gpus} if on_gpu else {})},
            key,
            seed,
            None if first_port is None else first_port + number,
        )
        for number in range(count)
    ]


def new_api_key() -> str:
    return secrets.token_hex(32)  # a key that begins with a dash would be taken for an option


def write_private(path: Path, text: str) -> None:
    """A file that its owner alone can read, from its first byte on."""
    path.unlink(missing_ok=True)  # an older one may be readable by others
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def read_api_key(config: ServerConfig) -> str | None:
    if config.api_key_file is None:
        return None
    return Path(config.api_key_file).expanduser().read_text(encoding="utf-8").strip()
