"""No rank waits for ever: each shows a sign of life with what it is doing, and looks at the others'.

Rank 0 looks at all, the others at rank 0. A rank that falls silent for `timeout_s`, or a piece of work that outlives its
limit, ends the run: every rank writes the stacks of all its threads and what it waited for to run_dir/logs/stacks, and one
line says who waited for whom. Two threads a process: one talks to the store and may get stuck there, one judges and never
talks. All clocks are monotonic.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from lens_megatron import stacks, workers
from lens_megatron.errors import Terminated, UsageError
from lens_megatron.mcore import agreement

MARGIN_S = 5.0  # who knows whom it waited for gives up first: the watch before a collective, a save before the watch
_watches = 0  # of this process: every rank has had as many, so that their keys agree
_BROKEN_OFF = "lens_megatron_broken_off"  # of an error: what the main thread did
_TELL_S = 2.0  # a store that does not answer must not keep the run from ending
_LINGER_S = 15.0  # of a rank that heard of another's error, for its own to come or the launcher to end it
_SPEAKING_S = 10.0  # of the rank that says why the run ends, until it leaves; the others leave after it


class Watch:
    def __init__(self, run_dir: Path, timeout_s: float) -> None:
        global _watches
        _watches += 1
        self._key = f"lens/watch/{_watches}"
        self._end = f"{self._key}/end"
        self._said = f"{self._key}/said"
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._run_dir, self._timeout_s = run_dir, timeout_s
        self._beat_s = min(2.0, timeout_s / 8)
        now = time.monotonic()
        self._doing: tuple[str, float, float | None] = ("start", now, None)  # what, since, limit in seconds
        self._peers = [] if self.ranks == 1 else list(range(1, self.ranks)) if self.rank == 0 else [0]
        self._seen = dict.fromkeys(self._peers, ("", now, "start"))  # last sign, when it changed, what it does
        self._exchanged = now
        self._closed = threading.Event()
        self._ended = threading.Lock()
        if self.ranks > 1:
            self._store = _own_connection()
            threading.Thread(target=self._exchange, name="watch: signs of life", daemon=True).start()
            agreement.limited = lambda limit_s: self.doing(self._doing[0], limit_s or timeout_s)
        threading.Thread(target=self._judge, name="watch: judge", daemon=True).start()

    @contextlib.contextmanager
    def doing(self, what: str, limit_s: float | None = None) -> Iterator[None]:
        """What the main thread does; over `limit_s` the run ends. Without a limit something else must have one: the time
        limit of a collective, of the rollout driver, or of rank 0's sign of life."""
        before = self._doing
        self._doing = (what, time.monotonic(), limit_s)
        try:
            yield
        except (Exception, Terminated) as error:
            error.__dict__.setdefault(_BROKEN_OFF, self._doing)
            raise
        finally:
            outermost = before[0] in ("start", "go on")
            self._doing = ("go on" if outermost else before[0], time.monotonic(), before[2])

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """An error of this rank is written down with its stack, and the other ranks are told."""
        try:
            yield
        except (UsageError, KeyboardInterrupt):
            raise
        except (Exception, Terminated) as error:
            what, since, _ = error.__dict__.get(_BROKEN_OFF, self._doing)
            self._doing = (what, since, None)
            self._say("error", f"rank {self.rank} failed: {error}", "".join(traceback.format_exception(error)))
            raise

    def close(self) -> None:
        agreement.limited = agreement.unlimited
        self._closed.set()

    def dump(self, reason: str, more: str = "") -> Path | None:
        """Stacks of all threads, to the run folder, or to a temporary one when that does not answer."""
        what, since, _ = self._doing
        lines = [
            stacks.process_line(self.rank, self.ranks),
            f"reason: {reason}",
            f"doing: {what}, for {time.monotonic() - since:.1f} s",
            *(f"rank {peer}: last seen doing {doing!r}" for peer, (_, _, doing) in sorted(self._seen.items())),
            more,
        ]
        return stacks.write(self._run_dir, self.rank, lines)

    # the thread that talks

    def _exchange(self) -> None:
        number = 0
        while not self._closed.wait(self._beat_s):
            number += 1
            what, since, _ = self._doing
            try:
                self._store.set(f"{self._key}/{self.rank}", json.dumps([number, what, time.monotonic() - since]))
                for peer in self._peers:
                    if self._store.check([f"{self._key}/{peer}"]):
                        self._saw(peer, self._store.get(f"{self._key}/{peer}").decode())
                if self._store.check([self._end]):
                    self._told(*json.loads(self._store.get(self._end)))
            except RuntimeError:  # the store went with its holder: the launcher or a collective reports that
                time.sleep(self._beat_s)
                continue
            self._exchanged = time.monotonic()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._key}/{self.rank}", json.dumps(["closed", "done", 0.0]))

    def _saw(self, peer: int, sign: str) -> None:
        if sign != self._seen[peer][0]:
            self._seen[peer] = (sign, time.monotonic(), json.loads(sign)[1])

    def _say(self, kind: str, reason: str, more: str = "") -> tuple[Path | None, bool]:
        """Tells the others and writes the stacks, side by side: either may get stuck. Where the stacks are; and whether
        another rank was first to say that the run ends."""
        others_word = threading.Event()

        def tell() -> None:
            mine = json.dumps([kind, reason, self.rank])
            if self._store.compare_set(self._end, "", mine).decode() != mine:
                others_word.set()

        telling = _aside(tell if self.ranks > 1 else lambda: None)
        path = self.dump(reason, more)
        telling.join(_TELL_S)
        return path, others_word.is_set()

    def _told(self, kind: str, reason: str, who: int) -> None:
        if who == self.rank or self._closed.is_set() or not self._ended.acquire(blocking=False):
            return
        self.dump(reason)
        # another rank's error may be about to arrive here in its own way; a hang will not
        if kind != "error":
            self._leave_after_the_speaker()
        elif not self._closed.wait(_LINGER_S):
            _leave(_silently())

    def _leave_after_the_speaker(self) -> None:
        """Who started the ranks ends all of them soon after the first that leaves: that must be the one that says why."""
        _aside(lambda: self._store.wait([self._said], timedelta(seconds=_SPEAKING_S))).join(_SPEAKING_S)
        time.sleep(0.5)
        _leave(_silently())

    # the thread that judges

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(min(0.5, self._beat_s)):
            now = time.monotonic()
            if now - looked > max(5.0, self._timeout_s / 2):  # this process was stopped: it cannot tell who else was
                self._exchanged = now
                self._seen = {peer: (sign, now, doing) for peer, (sign, _, doing) in self._seen.items()}
            looked = now
            if (reason := self._complaint(now)) is not None and not self._closed.is_set():
                self._expire(reason)

    def _complaint(self, now: float) -> str | None:
        what, since, limit = self._doing
        if limit is not None and now - since > limit:
            return f"rank {self.rank} did not finish to {what} within {limit:g} s: a file system or a process does not answer"
        if self.ranks == 1:
            return None
        mine = f"while it was to {what}"
        if now - self._exchanged > self._timeout_s:
            return (
                f"rank {self.rank} waited for the store where ranks meet, {mine}: no answer for {self._timeout_s:g} s; the "
                "network, or the process that holds it (rank 0's, or the launcher), is stuck"
            )
        for peer, (sign, changed, doing) in self._seen.items():
            if now - changed > self._timeout_s and not sign.startswith('["closed"'):
                return (
                    f"rank {self.rank} waited for rank {peer}, {mine}: no sign of life from rank {peer} for "
                    f"{self._timeout_s:g} s, last seen as it was to {doing}"
                )
        return None

    def _expire(self, reason: str) -> None:
        if not self._ended.acquire(blocking=False):
            return
        path, told = self._say("hang", reason)
        if told:  # two limits at once: the first to say so speaks
            self._leave_after_the_speaker()
            return
        print(
            f"failed: {reason}; stacks of all ranks: {path.parent if path else 'not written'}",
            file=sys.stderr,
            flush=True,
        )
        if self.ranks > 1:
            time.sleep(2 * self._beat_s)  # the others write their stacks
            _aside(lambda: self._store.set(self._said, "yes")).join(_TELL_S)
        _leave(1)


def _aside(talk: Callable[[], None]) -> threading.Thread:
    """Talks to the store in a thread of its own: it may get stuck there, or find it gone."""

    def unless_it_is_gone() -> None:
        with contextlib.suppress(RuntimeError):
            talk()

    thread = threading.Thread(target=unless_it_is_gone, daemon=True)
    thread.start()
    return thread


def _silently() -> int:
    """The exit code of a rank that leaves the talking to another one."""
    return workers.LOST_PEER if workers.is_local_worker() else 1


def _leave(code: int) -> None:
    """Now, with the processes that this one started: they would wait for a main thread that is stuck."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(code)


def _own_connection() -> Any:
    """A connection of our own: a wait on the default one keeps every other thread off it."""
    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    try:
        return store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError, NotImplementedError):
        return store
