"""A SIMULATED engine: latencies from a stated model, no language model behind it. For benchmarks of schedules only.

Time is virtual. A token step of a server with b running rows takes `token_seconds * (1 + b / saturation_rows)`: memory
bound while few rows run, then linear. Response lengths are log-normal and cut at max_tokens; a prompt's success rate is
drawn from a U-shaped Beta, and failures run longer than successes. Everything follows from the requests' seeds, never
from the schedule. `Simulation.reward` gives the reward that belongs to a response.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lens_megatron.rollout.engine import Finished, Health, Request, VersionSpan, derive_seed
from lens_megatron.types import Prompt, Rollout

if TYPE_CHECKING:
    import torch

    from lens_megatron.types import FinishReason

SUCCESS, FAILURE = 1, 0  # the first token of a simulated response


@dataclass(frozen=True)
class SimulationConfig:
    """success_shape      both parameters of the Beta that success rates are drawn from; below 1 it is U-shaped.
    success_scale      its upper end.
    purified_gain      what a purified prompt adds to its success rate, up to 0.95.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    servers: int = 8
    slots_per_server: int = 256
    token_seconds: float = 0.01
    saturation_rows: float = 200.0
    log_length_of_success: float = 6.6
    log_length_of_failure: float = 7.2
    log_length_spread: float = 0.7
    success_shape: float = 0.5
    success_scale: float = 0.9
    purified_gain: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.servers < 1 or self.slots_per_server < 1:
            raise ValueError("servers and slots_per_server are at least 1")
        if self.token_seconds <= 0 or self.saturation_rows <= 0 or self.success_shape <= 0:
            raise ValueError("token_seconds, saturation_rows and success_shape are above 0")


@dataclass(frozen=True)
class Simulation:
    """What the model says about a request, whenever it runs. A prompt is known by its tokens; its purified form has
    the original's first token, which is the prompt's number, and fewer tokens than `original_length`."""

    config: SimulationConfig
    original_length: int

    def success_rate(self, prompt: Sequence[int]) -> float:
        rng = random.Random(derive_seed("rate", self.config.seed, prompt[0]))
        rate = rng.betavariate(self.config.success_shape, self.config.success_shape) * self.config.success_scale
        return min(0.95, rate + self.config.purified_gain) if len(prompt) < self.original_length else rate

    def response(self, request: Request) -> tuple[bool, int]:
        """(success, tokens)."""
        rng = random.Random(derive_seed("response", self.config.seed, request.prompt, request.seed))
        success = rng.random() < self.success_rate(request.prompt)
        middle = self.config.log_length_of_success if success else self.config.log_length_of_failure
        return success, min(request.max_tokens, int(math.exp(rng.gauss(middle, self.config.log_length_spread))) + 1)

    def reward(self, prompt: Prompt, rollout: Rollout) -> float:
        return float(rollout.response[0] == SUCCESS)

    def prompts(self, count: int) -> tuple[list[Prompt], list[tuple[int, ...]]]:
        """Prompts, and the tokens of their purified forms."""
        tail = tuple(range(1, self.original_length))
        prompts = [Prompt(f"simulated-{i}", (i, *tail), (1, self.original_length), "") for i in range(count)]
        return prompts, [prompt.tokens[:-1] for prompt in prompts]


class _Server:
    """Rows that advance together. `work` counts token steps since the start; a row is done at a fixed count."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[Request, float]] = {}  # id -> (request, work at its start)
        self.ends: list[tuple[float, int, str]] = []  # heap of (work at its end, order, id)
        self.work = 0.0
        self.time = 0.0


class SimulatedEngine:
    """Implements `Engine` in virtual time; `clock` is that time."""

    deterministic = True
    positions = None

    def __init__(self, simulation: Simulation) -> None:
        self.simulation, self.config = simulation, simulation.config
        self._servers = [_Server() for _ in range(self.config.servers)]
        self._where: dict[str, _Server] = {}
        self._done: list[Finished] = []
        self._time, self._order, self._version = 0.0, 0, 0

    @property
    def version(self) -> int:
        return self._version

    def clock(self) -> float:
        return self._time

    def free_slots(self) -> int:
        return self.config.servers * self.config.slots_per_server - len(self._where)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in sorted(requests, key=lambda r: r.priority):
            server = min(self._servers, key=lambda s: len(s.rows))
            if len(server.rows) >= self.config.slots_per_server:
                raise ValueError("more requests than free slots: the simulation has no queue of its own")
            self._advance(server)
            _, tokens = self.simulation.response(request)
            self._order += 1
            server.rows[request.id] = (request, server.work)
            heapq.heappush(server.ends, (server.work + tokens, self._order, request.id))
            self._where[request.id] = server

    def poll(self, timeout: float) -> list[Finished]:
        """Goes forward to the next event, however far that is."""
        if not self._done:
            ends = [(self._end(server), i) for i, server in enumerate(self._servers) if server.rows]
            if ends:
                when, index = min(ends)
                self._time = when
                server = self._servers[index]
                self._advance(server)
                while server.ends and server.ends[0][0] <= server.work + 1e-6:
                    self._leave(server, heapq.heappop(server.ends)[2])
        done, self._done = self._done, []
        return done

    def abort(self, ids: Iterable[str]) -> None:
        for request_id in ids:
            if server := self._where.get(request_id):
                self._advance(server)
                self._leave(server, request_id, aborted=True)

    def begin_update(self, version: int) -> None:
        self._version = version

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """There is no model to update."""

    def end_update(self) -> None:
        """There is no model to update."""

    def health(self) -> Health:
        return Health(True, len(self._where), 0, self._version, self._order, "simulated")

    def close(self) -> None:
        self._where = {}

    def _row_step(self, server: _Server) -> float:
        return self.config.token_seconds * (1 + len(server.rows) / self.config.saturation_rows)

    def _end(self, server: _Server) -> float:
        """When the server's next row is done, if none joins or leaves before."""
        while server.ends[0][2] not in server.rows:  # aborted
            heapq.heappop(server.ends)
        return server.time + (server.ends[0][0] - server.work) * self._row_step(server)

    def _advance(self, server: _Server) -> None:
        server.work += (self._time - server.time) / self._row_step(server)
        server.time = self._time

    def _leave(self, server: _Server, request_id: str, aborted: bool = False) -> None:
        if request_id not in server.rows:
            return
        request, begun = server.rows.pop(request_id)
        del self._where[request_id]
        success, tokens = self.simulation.response(request)
        if aborted:
            tokens = min(tokens, int(server.work - begun))
        first = (SUCCESS if success else FAILURE,) if tokens else ()
        response = (*first, *(2,) * (tokens - 1))
        span = (VersionSpan(self._version, 0, tokens),)
        finish: FinishReason = "abort" if aborted else ("length" if tokens == request.max_tokens else "stop")
        self._done.append(Finished(request_id, response, (0.0,) * tokens, finish, span))
