"""`rollout.server:` of RUN.yaml: how SGLang servers are started, or where they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

Argument = bool | int | float | str | list[str] | list[int]
# given by keys of their own, or decided here
_OWN = {"model_path", "model", "host", "port", "tp_size", "tp", "ep_size", "ep", "dp_size", "dp", "api_key", "config",
        "weight_version", "tensor_parallel_size", "data_parallel_size", "expert_parallel_size"}  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """tp, ep, dp        tensor, expert and data parallel sizes of one server.
    args              any other argument of sglang.launch_server by its name, as {mem_fraction_static: 0.8}.
    python            of the environment that has sglang; default: this one.
    command           what to run instead of `PYTHON -m sglang.launch_server`, such as a container's command; the
                      server's arguments are added to it.
    env               environment variables of the server, beside this process's own.
    host              address to bind, and to reach it by.
    first_gpu         the first GPU that servers may take on this machine; default: after the trainer's own when
                      `placement` is disaggregated, and 0 when it is colocated.
    urls              servers that somebody else runs, instead of starting any.
    router            URL of SGLang's router before `urls`: rollouts go through it, everything else to the servers.
    api_key_file      holds the key of the servers at `urls`.
    restarts          how often a server that died or hung is started again, in a whole run.
    start_timeout_s   until a server is ready.
    request_timeout_s of one rollout.
    control_timeout_s of everything else that a server is asked.
    silence_s         a server that has rollouts and for so long neither samples nor answers is taken for dead.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    tp: int = 1
    ep: int = 1
    dp: int = 1
    args: dict[str, Argument] = field(default_factory=dict)
    python: str | None = None
    command: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    first_gpu: int | None = None
    urls: tuple[str, ...] = ()
    router: str | None = None
    api_key_file: str | None = None
    restarts: int = 3
    start_timeout_s: float = 1200.0
    request_timeout_s: float = 3600.0
    control_timeout_s: float = 300.0
    silence_s: float = 120.0

    def __post_init__(self) -> None:
        if min(self.tp, self.ep, self.dp) < 1:
            raise ValueError("tp, ep and dp are at least 1")
        if self.restarts < 0:
            raise ValueError(f"restarts is at least 0 (got {self.restarts})")
        for name in ("start_timeout_s", "request_timeout_s", "control_timeout_s", "silence_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is above 0 (got {getattr(self, name)})")
        for name in self.args:
            if name.replace("-", "_") in _OWN:
                raise ValueError(f"args.{name} is set by a key of its own, or by the run: leave it out of args")
        if self.dp > 1 and not self.argument("enable_dp_attention"):
            raise ValueError(
                "dp above 1 takes weights only with args: {enable_dp_attention: true}; without it use rollout.servers"
            )
        if self.urls and (self.command or self.python):
            raise ValueError("urls are servers that run already: give either them or how to start servers")
        if (self.router or self.api_key_file) and not self.urls:
            raise ValueError("router and api_key_file belong to servers given by urls")
        for url in (*self.urls, *([self.router] if self.router else [])):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no URL: write it as http://HOST:PORT")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError("urls: the same server twice")
        if self.api_key_file is not None and not Path(self.api_key_file).expanduser().is_file():
            raise ValueError(f"api_key_file: there is no file {self.api_key_file}")

    def argument(self, name: str) -> Argument | None:
        """Of `args`, however its name is spelled."""
        return next((value for key, value in self.args.items() if key.replace("-", "_") == name), None)

    @property
    def gpus(self) -> int:
        """Of one server; under data-parallel attention the ranks share those of tp."""
        return self.tp * int(str(self.argument("pp_size") or 1))
