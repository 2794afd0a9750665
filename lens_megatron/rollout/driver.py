"""Rank 0's rollout driver: a process of its own that holds engine, sampler and rewards, and takes commands by pipe.

It is spawned before CUDA is touched, so that generation, HTTP and rewards never share an interpreter lock with kernel
launches. Nothing here waits for ever: the driver beats every second, a command has its time, a message on its way moves,
and a driver that dies, falls silent or raises is one error in the caller. When the caller goes away the driver sees the
pipe close and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NoReturn

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.driver_process import BEAT_SECONDS, CLOSE_SECONDS, serve
from lens_megatron.rollout.shared_buffer import SharedBuffer, bytes_needed
from lens_megatron.workers import rank

if TYPE_CHECKING:
    import torch

    from lens_megatron.evaluation.answering import Answer, Limits
    from lens_megatron.evaluation.sets import Question
    from lens_megatron.rollout.engine import Health
    from lens_megatron.rollout.sampler import Sampler
    from lens_megatron.rollout.sampling import SampleResult, SamplingConfig
    from lens_megatron.rollout.sglang_server import ServerAddress
    from lens_megatron.types import Prompt, PurifiedPrompt

# done at once, also while sampling; the engine's own by engines that are servers
ASIDE = ("servers", "restart_servers", "begin_update", "end_update", "reward_health")
SILENCE_SECONDS = 60.0  # without a beat: the process is stopped or the machine swaps
START_SECONDS = 600.0
COMMAND_SECONDS = 600.0


class RolloutDriver:
    """The caller's end. `make_sampler` runs in the driver's process: a module's function, or a partial of one.

    It starts while the caller goes on; `started` waits for it, and so does whatever is asked of it first.
    """

    def __init__(
        self,
        make_sampler: Callable[[], Sampler],
        threads: int = 1,
        start_seconds: float = START_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        command_seconds: float = COMMAND_SECONDS,
    ) -> None:
        self._start_seconds, self._has_started = start_seconds, False
        self._silence_seconds, self._command_seconds = silence_seconds, command_seconds
        self._buffer: SharedBuffer | None = None
        self._sampling = False
        self._last_sign = time.monotonic()
        self._early: list[tuple[str, Any]] = []  # the sampling's answer, come while another was waited for
        self._failure: RunError | None = None
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=True)
        _limit_standstill(self._pipe, silence_seconds)
        # not a daemon: reward workers are its own processes
        self._process = context.Process(target=serve, args=(theirs, make_sampler, threads), name="rollout-driver")
        self._process.start()
        theirs.close()
        atexit.register(self.close)

    def started(self) -> None:
        """Returns when it is ready for commands; what it cannot start with is raised here."""
        if self._has_started:
            return
        if self._failure is not None:
            raise self._failure
        try:
            self._reply(self._start_seconds, "start")
        except BaseException:
            self.close()
            raise
        self._has_started = True

    @property
    def pid(self) -> int | None:
        return self._process.pid

    # of an engine that is servers; also while sampling

    def servers(self) -> list[ServerAddress]:
        """Those that answer. Weights reach them past this process."""
        return self._call("servers")

    def trainers_turn(self) -> list[ServerAddress]:
        """On shared GPUs: those that hold memory there. None is started until `engines_turn`."""
        return self._call("trainers_turn")

    def engines_turn(self) -> list[ServerAddress]:
        return self._call("engines_turn")

    def begin_update(self, version: int) -> None:
        self._call("begin_update", version)

    def end_update(self, synced: Sequence[ServerAddress], label: str | None = None) -> None:
        """`synced`: the servers that hold the version of begin_update whole. `label`: what they call it."""
        self._call("end_update", synced, label)

    def restart_servers(self, silent: Sequence[ServerAddress], reason: str) -> bool:
        """Those of them that the run started itself. Waits for the first; whether one is back, and the update begun anew."""
        return self._call("restart_servers", silent, reason)

    def load_weights(self, buckets: Iterable[Mapping[str, torch.Tensor]], version: int) -> None:
        """All weights by Hugging Face name, bucket by bucket; one bucket is held at a time."""
        self._call("begin_update", version)
        for bucket in buckets:
            size = bytes_needed(bucket)
            if self._buffer is None or self._buffer.size < size:
                self._replace_buffer(size)
            assert self._buffer is not None
            self._call("update", self._buffer.write(bucket))
        self._call("end_update")

    def start_sampling(
        self,
        prompts: Sequence[Prompt],
        purified: Sequence[PurifiedPrompt | None],
        step: int,
        config: SamplingConfig | None = None,
    ) -> None:
        self._send("sample", list(prompts), list(purified), step, config)
        self._sampling, self._last_sign = True, time.monotonic()

    def sampled(self, timeout: float) -> SampleResult | None:
        """What `start_sampling` asked for, or None when it takes longer than `timeout` seconds."""
        if not self._sampling:
            raise ValueError("nothing is being sampled")
        try:
            result = self._reply(None, "sample", patience=timeout)
        except BaseException:
            self._sampling = False
            raise
        self._sampling = result is _NOT_YET
        return None if result is _NOT_YET else result

    def sample(
        self,
        prompts: Sequence[Prompt],
        purified: Sequence[PurifiedPrompt | None],
        step: int,
        config: SamplingConfig | None = None,
    ) -> SampleResult:
        self.start_sampling(prompts, purified, step, config)
        while True:
            if (result := self.sampled(BEAT_SECONDS)) is not None:
                return result

    def evaluate(self, questions: Sequence[Question], limits: Limits) -> list[Answer]:
        """Answers to all questions, in their order. What the sampler knows and draws stays as it is."""
        self._send("evaluate", list(questions), limits)
        return self._reply(None, "evaluate")

    def health(self) -> Health:
        return self._call("health")

    def weight_checksums(self) -> dict[str, str] | None:
        """Of the weights that the engine holds; None of an engine whose sync proves them itself."""
        return self._call("weight_checksums")

    def reward_health(self) -> dict[str, float]:
        """The reward pool's counters since the start; empty where rewards have no pool."""
        return self._call("reward_health")

    def state_dict(self) -> dict[str, Any]:
        return self._call("state_dict")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._call("load_state_dict", state)

    def close(self) -> None:
        """Ends the process, by force when it does not end by itself."""
        atexit.unregister(self.close)
        if self._failure is None:
            self._failure = RunError("the rollout driver was closed")
        if not self._pipe.closed:
            self._pipe.close()  # the driver sees the end of its input
            for end in (self._process.terminate, self._process.kill):
                self._process.join(CLOSE_SECONDS)
                if self._process.is_alive():
                    end()
            self._process.join(CLOSE_SECONDS)
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _replace_buffer(self, size: int) -> None:
        if self._buffer is not None:
            self._buffer.close()
        self._buffer = SharedBuffer.create(size)
        self._send("buffer", size)
        assert self._process.pid is not None
        with self._on_its_way("buffer"):
            reduction.send_handle(self._pipe, self._buffer.descriptor, self._process.pid)

    def _call(self, command: str, *args: Any) -> Any:
        self._send(command, *args)
        return self._reply(self._command_seconds, command)

    def _send(self, command: str, *args: Any) -> None:
        self.started()
        if self._failure is not None:
            raise self._failure
        if self._sampling and command not in ASIDE:
            raise ValueError(f"{command!r} while sampling")
        if self._sampling:
            command, args = "aside", (command, *args)
        with self._on_its_way(command):
            self._pipe.send((command, args))

    @contextlib.contextmanager
    def _on_its_way(self, command: str) -> Iterator[None]:
        """Around a message: the other end may die, or stop, while half of it has been passed."""
        try:
            yield
        except BlockingIOError:  # what _limit_standstill asked for
            self._fell_silent(self._silence_seconds, command)
        except (EOFError, OSError):  # a plain OSError is the end of the pipe within a message
            self._died()

    def _reply(self, limit: float | None, command: str, patience: float | None = None) -> Any:
        """The next answer. `limit` seconds end in an error, `patience` seconds in _NOT_YET."""
        start = time.monotonic()
        if patience is None:  # else one of many looks at the same sampling
            self._last_sign = start
        silence = float("inf") if command == "start" else self._silence_seconds  # importing, it cannot beat yet
        while True:
            now = time.monotonic()
            if command == "sample" and self._early:
                return _answered(*self._early.pop())
            if patience is not None and now - start >= patience and not self._pipe.poll():
                return _NOT_YET
            if limit is not None and now - start > limit:
                self._give_up(f"did not finish {command!r} within {limit:g} s, which rank {rank()} waits for")
            if now - self._last_sign > silence and not self._pipe.poll():  # its beats of a long while may wait there
                self._fell_silent(silence, command)
            left = BEAT_SECONDS if patience is None else max(0.0, min(BEAT_SECONDS, start + patience - now))
            if self._pipe not in wait([self._pipe, self._process.sentinel], left):
                if not self._process.is_alive() and not self._pipe.poll():
                    self._died()
                continue
            with self._on_its_way(command):
                kind, value, aside = self._pipe.recv()
            self._last_sign = time.monotonic()
            if kind == "beat":
                continue
            if self._sampling and command != "sample" and not aside:
                self._early.append((kind, value))
            else:
                return _answered(kind, value)

    def _died(self) -> NoReturn:
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        self._give_up(f"{how}; what it printed last tells why")

    def _fell_silent(self, seconds: float, command: str) -> NoReturn:
        self._give_up(f"gave no sign of life for {seconds:g} s during {command!r}, which rank {rank()} waits for")

    def _give_up(self, what: str) -> NoReturn:
        self._failure = RunError(f"the rollout driver (process {self._process.pid}) {what}")
        if self._process.is_alive():
            self._process.kill()
        self.close()
        raise self._failure


def _limit_standstill(pipe: Connection, seconds: float) -> None:
    """A message of which nothing moves for `seconds` is a BlockingIOError: a process that has stopped neither empties the
    socket's buffer nor sends the rest of an answer. The kernel counts, so that messages which move cost nothing more.

    A write that ran into its limit tells first what it had passed, and the next one fails: half the time for each.
    """
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        for option, limit in ((socket.SO_SNDTIMEO, seconds / 2), (socket.SO_RCVTIMEO, seconds)):
            whole = int(limit)
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, int((limit - whole) * 1e6)))


def _answered(kind: str, value: Any) -> Any:
    if kind == "usage error":
        raise UsageError(value)
    if kind == "error":
        raise RunError(value)
    return value


_NOT_YET = object()
