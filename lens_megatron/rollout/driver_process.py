"""The rollout driver's own process: what it does with the commands that come by pipe (driver.py has the caller's end).

Three threads: the main one carries out commands in turn, one listens, one beats. What is asked aside gets its own. A loop
that goes round no more, in an engine that does not return or a reward that does not, is the beating thread's to find: the
loop's own watch for stalls cannot run then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import RunError, UsageError
from lens_megatron.rollout.shared_buffer import SharedBuffer

if TYPE_CHECKING:
    from lens_megatron.evaluation.answering import Answer, Limits
    from lens_megatron.evaluation.sets import Question
    from lens_megatron.rollout.sampler import Sampler

BEAT_SECONDS = 1.0
CLOSE_SECONDS = 10.0
STUCK_LEEWAY_SECONDS = 60.0  # past stall_seconds, which one round of a loop may take


def serve(pipe: Connection, make_sampler: Callable[[], Sampler], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, which closes the pipe
    import torch

    torch.set_num_threads(threads)
    sending = threading.Lock()
    looping: list[str] = []  # the command whose loop goes round, if one does

    @contextlib.contextmanager
    def watched(command: str) -> Iterator[None]:
        if command not in ("sample", "evaluate"):
            yield
            return
        sampler.turned_at = time.monotonic()
        looping.append(command)
        try:
            yield
        finally:
            looping.remove(command)  # before its answer is sent, which may have to wait until somebody reads it

    def answer(kind: str, value: Any = None, aside: bool = False) -> None:
        # a broken pipe: _listen sees that the caller is gone
        with sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            pipe.send((kind, value, aside))

    def carry_out(command: str, args: tuple[Any, ...], buffer: SharedBuffer | None, aside: bool = False) -> None:
        try:
            with watched(command):
                value = execute(sampler, buffer, command, args)
            answer("answer", value, aside)
        except UsageError as error:
            answer("usage error", str(error), aside)
        except RunError as error:
            answer("error", str(error), aside)
        except Exception as error:
            traceback.print_exc()
            answer("error", f"the rollout driver failed in {command!r}: {type(error).__name__}: {error}", aside)

    def meanwhile(command: str, *args: Any) -> None:
        threading.Thread(target=carry_out, args=(command, args, None, True), daemon=True).start()

    def beat() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            answer("beat")
            for command in tuple(looping):
                limit = sampler.config.stall_seconds + STUCK_LEEWAY_SECONDS
                if time.monotonic() - sampler.turned_at > limit:
                    faulthandler.dump_traceback(all_threads=True)
                    answer(
                        "error", f"the rollout driver was stuck in {command!r} for {limit:g} s; its stacks are above"
                    )
                    os._exit(1)

    threading.Thread(target=beat, daemon=True).start()
    try:
        sampler = make_sampler()
    except UsageError as error:
        return answer("usage error", str(error))
    except RunError as error:  # a server that does not come up, say: it says all there is to say
        return answer("error", str(error))
    except Exception as error:
        traceback.print_exc()
        return answer("error", f"the rollout driver could not start: {type(error).__name__}: {error}")
    answer("answer")

    commands: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue()
    threading.Thread(target=_listen, args=(pipe, sampler, commands, meanwhile), daemon=True).start()
    buffer: SharedBuffer | None = None
    while True:
        command, args = commands.get()
        if command == "close":
            break
        if command == "buffer":
            buffer = SharedBuffer(*args)
            continue
        carry_out(command, args, buffer)
    sampler.close()
    os._exit(0)  # threads of reward pools and clients may still hang


def execute(sampler: Sampler, buffer: SharedBuffer | None, command: str, args: tuple[Any, ...]) -> Any:
    engine = sampler.engine
    if command == "evaluate":
        return _evaluate(sampler, *args)
    if command == "update":
        assert buffer is not None
        return engine.update(buffer.read(*args))
    if command in ("servers", "restart_servers", "trainers_turn", "engines_turn"):
        return getattr(engine, command)(*args)  # only some engines work with servers
    if command == "weight_checksums":
        checksums = getattr(engine, "checksums", None)
        return checksums() if checksums is not None else None
    if command == "reward_health":
        health = getattr(sampler.reward, "health", None)
        return dict(health()) if health is not None else {}
    targets: dict[str, Callable[..., Any]] = {
        "begin_update": engine.begin_update,
        "end_update": engine.end_update,
        "health": engine.health,
        "sample": sampler.sample,
        "state_dict": sampler.state_dict,
        "load_state_dict": sampler.load_state_dict,
    }
    return targets[command](*args)


def _evaluate(sampler: Sampler, questions: Sequence[Question], limits: Limits) -> list[Answer]:
    from lens_megatron.evaluation.answering import answer_all

    answers: dict[tuple[str, str, int, str], Answer] = {}
    # `judge` is what a TextReward has, and every sampler of a run is made with one
    judge = sampler.reward.judge  # type: ignore[attr-defined]
    answer_all(
        sampler.engine,
        judge,
        questions,
        replace(limits, stop_tokens=sampler.stop_tokens),
        lambda question, answer: answers.update({question.key: answer}),
        sampler.stopping,
    )
    return [answers[question.key] for question in questions]


def _listen(
    pipe: Connection,
    sampler: Sampler,
    commands: queue.Queue[tuple[str, tuple[Any, ...]]],
    meanwhile: Callable[..., None],
) -> None:
    """Commands go to the main thread; what is asked aside and the end of the caller act at once."""
    while True:
        try:
            command, args = pipe.recv()
            if command == "buffer":
                args = (reduction.recv_handle(pipe), *args)
        except (EOFError, ConnectionResetError, OSError):
            sampler.stop()
            commands.put(("close", ()))
            time.sleep(0.8 * CLOSE_SECONDS)
            os._exit(1)
        if command == "aside":
            meanwhile(*args)
            continue
        commands.put((command, args))
