"""Responses judged in worker processes that may be killed at any time: hostile text cannot hang, crash or grow us.

One thread of this process hands out work, one response a worker, and watches the clocks. Futures report back, so that a
loop, a driver or asyncio (`asyncio.wrap_future`) can wait for them.
"""

from __future__ import annotations

import contextlib
import json
import math
import selectors
import socket
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from hashlib import blake2b
from types import TracebackType
from typing import Any

from lens_megatron import strict
from lens_megatron.errors import RunError
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.judgement import Judgement, Note
from lens_megatron.rewards.worker import OUT_OF_MEMORY
from lens_megatron.rewards.worker_process import Job, Request, Worker, started

STARTUP_SECONDS = 180.0
STARTS_BEFORE_GIVING_UP = 3
ATTEMPTS = 2  # a worker may die of what it did before: the second one starts clean
MAX_ANSWER_CHARS = 20_000
LEEWAY = 0.5  # seconds of CPU past the limit before a worker that did not stop by itself is killed


class RewardPool:
    """submit(...) -> future of a Judgement; grade_all(...) -> all of them, in order; health(); close().

    stall_seconds  without a judgement that a worker came to, while some are awaited: then nothing more is judged. One that
                   times out counts as 0 and says nothing; when all do, training on zeros must not go on for hours.
    """

    def __init__(self, config: RewardConfig | None = None, stall_seconds: float = math.inf) -> None:
        self.config = config or RewardConfig()
        self._stall_seconds = stall_seconds
        # when a worker last got something done, or nothing waited, and how many had timed out by then
        self._moved, self._timeouts_then = time.monotonic(), 0
        self._queues: dict[bool, deque[Job]] = {False: deque(), True: deque()}
        self._workers: list[Worker] = []
        self._cache: OrderedDict[bytes, Judgement] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._failed_starts = 0
        self._broken: str | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._settings = json.dumps(strict.to_tree(RewardConfig, self.config))
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what callers use, from any thread

    def submit(self, id: str, source: str, answer: str, response: str, cut: bool = False) -> Future[Judgement]:
        """Judged as soon as a worker is free. The future fails only when a reward of the user's own does. `cut`: the response
        ran into the length limit."""
        request = Request(id, source, answer, response, cut)
        future: Future[Judgement] = Future()
        rule = self.config.rule(source)
        if rule is None:
            known = ", ".join(self.config.sources) or "none"
            raise RunError(
                f"{id}: no reward for source {source!r} (rewards.sources has {known}; rewards.default is null)"
            )
        with self._lock:
            if self._broken or self._closing:
                raise RunError(self._broken or "the reward pool is closed")
            self._counts["submitted"] += 1
            if len(response) > self.config.max_response_chars or len(answer) > MAX_ANSWER_CHARS:
                self._counts["too_long"] += 1
                future.set_result(Judgement(0.0, "unparsable", "too long"))
                return future
            key = _key(self.config, request)
            if key is not None and key in self._cache:
                self._cache.move_to_end(key)
                self._counts["cached"] += 1
                future.set_result(self._cache[key])
                return future
            self._queues[rule.custom].append(Job(request, rule.custom, future, key))
        self._wake()
        return future

    def grade_all(self, requests: Iterable[Request]) -> list[Judgement]:
        futures = [self.submit(r.id, r.source, r.answer, r.response, r.cut) for r in requests]
        return [future.result() for future in futures]

    def health(self) -> dict[str, float]:
        """Counters since the start, for metrics."""
        names = ("submitted", "judged", "cached", "too_long", "timeouts", "killed", "memory", "crashes", "restarts")
        with self._lock:
            return {name: float(self._counts[name]) for name in names}

    def worker_pids(self) -> list[int]:
        with self._lock:
            return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """Kills the workers; what was not judged yet fails."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join()

    # ---- the thread

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nothing to wake
            self._wake_writer.send(b"x")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._start_missing()
                self._hand_out()
                for key, _ in self._selector.select(self._seconds_to_next_look()):
                    if key.data is None:
                        self._drain_wake()
                    else:
                        self._read(key.data)
                self._read_clocks()
        except Exception as error:
            self._break(f"the reward pool failed: {type(error).__name__}: {error}")
        finally:
            self._shut_down()

    def _drain_wake(self) -> None:
        while True:
            try:
                if len(self._wake_reader.recv(4096)) < 4096:
                    return
            except BlockingIOError:
                return

    def _start_missing(self) -> None:
        """Workers of a kind are started when there is work for them, and kept."""
        for custom in (False, True):
            have = [worker for worker in self._workers if worker.custom == custom]
            busy = sum(worker.job is not None for worker in have)
            wanted = min(self.config.processes, len(self._queues[custom]) + busy)
            for _ in range(wanted - len(have)):
                if self._broken is None:
                    self._start(custom)

    def _start(self, custom: bool) -> None:
        worker = started(custom, self._settings)
        worker.look_at = time.monotonic() + STARTUP_SECONDS
        with self._lock:
            self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            while worker.ready and worker.job is None:
                with self._lock:
                    job = self._queues[worker.custom].popleft() if self._queues[worker.custom] else None
                if job is None:
                    break
                if job.attempts == 0 and not job.future.set_running_or_notify_cancel():
                    continue
                self._give(worker, job)

    def _give(self, worker: Worker, job: Job) -> None:
        job.attempts += 1
        worker.wall_start, worker.cpu_start = time.monotonic(), -1.0
        worker.look_at = worker.wall_start + (self.config.wall_seconds if job.custom else min(1.0, self.config.seconds))
        if not worker.give(job):
            self._buried(worker)

    def _read(self, worker: Worker) -> None:
        if worker not in self._workers:
            return
        messages = worker.messages()
        if messages is None:
            self._buried(worker)
            return
        for message in messages:
            self._heard(worker, message)

    def _heard(self, worker: Worker, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, self._failed_starts = True, 0
            return
        if "failed" in message:
            self._break(message["failed"])
            return
        job, worker.job = worker.job, None
        if job is None:
            return
        if "error" in message:
            job.future.set_exception(RunError(f"{job.request.id}: {message['error']}"))
            return
        judgement = Judgement(**message["judgement"])
        timed_out = judgement.note == "timeout"
        if timed_out:
            with self._lock:
                self._counts["timeouts"] += 1
        else:
            self._has_moved()
        self._settle(job, judgement, remember=not timed_out)

    def _settle(self, job: Job, judgement: Judgement, remember: bool) -> None:
        with self._lock:
            self._counts["judged"] += 1
            if remember and job.key is not None:
                self._cache[job.key] = judgement
                while len(self._cache) > self.config.cache:
                    self._cache.popitem(last=False)
        job.future.set_result(judgement)

    def _seconds_to_next_look(self) -> float:
        now = time.monotonic()
        looks = [worker.look_at for worker in self._workers if worker.job is not None or not worker.ready]
        return max(0.0, min([*looks, now + 5]) - now)

    def _read_clocks(self) -> None:
        now = time.monotonic()
        self._watch_for_a_stall(now)
        for worker in list(self._workers):
            if (worker.job is None and worker.ready) or now < worker.look_at:
                continue
            if not worker.ready:
                self._kill(worker, "crashed")
                continue
            if worker.cpu_start < 0:  # the clock is read only for what takes long
                worker.cpu_start = worker.cpu()
            used, wall = worker.cpu() - worker.cpu_start, now - worker.wall_start
            left = self.config.seconds + LEEWAY - used
            if wall >= self.config.wall_seconds or (left <= 0 and not worker.custom):
                self._kill(worker, "timeout")
            else:
                worker.look_at = now + max(0.05, min(left, self.config.wall_seconds - wall))

    def _has_moved(self) -> None:
        self._moved, self._timeouts_then = time.monotonic(), self._counts["timeouts"]

    def _watch_for_a_stall(self, now: float) -> None:
        with self._lock:
            waiting = sum(len(jobs) for jobs in self._queues.values())
            waiting += sum(worker.job is not None for worker in self._workers)
        if waiting == 0:
            self._has_moved()
        elif now - self._moved > self._stall_seconds:
            self._break(
                f"the rollout process waited for the reward workers: no judgement for {self._stall_seconds:g} s, "
                f"{self._counts['timeouts'] - self._timeouts_then} timed out and {waiting} wait; does the reward function hang?"
            )

    def _kill(self, worker: Worker, note: Note) -> None:
        worker.kill()
        job, worker.job = worker.job, None
        if job is not None:
            with self._lock:
                self._counts["timeouts"] += 1
                self._counts["killed"] += 1
            self._settle(job, Judgement(0.0, "unparsable", note), remember=False)
        self._buried(worker)

    def _buried(self, worker: Worker) -> None:
        """A worker that is gone, or as good as gone. Its response gets one more try: the fault may have been another's."""
        if worker not in self._workers:
            return
        self._selector.unregister(worker.channel)
        code = worker.end()
        with self._lock:
            self._workers.remove(worker)
            self._counts["restarts"] += 1
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS_BEFORE_GIVING_UP:
                self._break(f"reward workers do not start (exit code {code}); their error is above")
        job, worker.job = worker.job, None
        if job is None:
            return
        if job.attempts < ATTEMPTS:
            with self._lock:
                self._queues[job.custom].appendleft(job)
            return
        out_of_memory = code == OUT_OF_MEMORY
        with self._lock:
            self._counts["memory" if out_of_memory else "crashes"] += 1
        self._settle(job, Judgement(0.0, "unparsable", "memory" if out_of_memory else "crashed"), remember=False)

    def _break(self, reason: str) -> None:
        """Nothing more can be judged: everyone who waits hears it, and nobody waits for ever."""
        with self._lock:
            self._broken = self._broken or reason
            waiting = [worker.job for worker in self._workers if worker.job is not None]
            waiting += [job for queue in self._queues.values() for job in queue]
            for queue in self._queues.values():
                queue.clear()
            for worker in self._workers:
                worker.job = None
        for job in waiting:
            if not job.future.done():
                job.future.set_exception(RunError(self._broken))

    def _shut_down(self) -> None:
        with self._lock:
            self._closing = True
        self._break("the reward pool is closed")
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.end()
        with self._lock:
            self._workers.clear()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()


def _key(config: RewardConfig, request: Request) -> bytes | None:
    if config.cache == 0:
        return None
    rule = config.rule(request.source)
    digest = blake2b(digest_size=16)
    # rules are looked up by source, but sources with the same rule share what they know
    source = request.source if rule is not None and rule.custom else ""
    for part in (repr((rule, request.cut)), source, request.answer, request.response):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()
