"""A reward worker: a process of its own that judges one response at a time, under limits the kernel keeps.

Started by pool.py as `python -m lens_megatron.rewards.worker`. Talks JSON lines over a socket: the trainer never
unpickles anything that has been near a response. Imports neither torch nor anything of a trainer.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from dataclasses import asdict
from types import FrameType
from typing import Any

from lens_megatron import strict
from lens_megatron.rewards.config import RewardConfig, RewardRule
from lens_megatron.rewards.custom import CustomRewardError, judge_custom, load
from lens_megatron.rewards.judge import judge
from lens_megatron.rewards.judgement import Judgement

OUT_OF_MEMORY = 77  # exit code
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.remove", "os.rename", "os.rmdir",
"os.mkdir", "os.kill",
              "subprocess.Popen", "socket.connect", "socket.bind", "pty.spawn", "shutil.rmtree", "os.symlink",
              "os.link", "os.truncate")  # fmt: skip


class OutOfTime(BaseException):
    """Not an Exception: no `except Exception` on the way may swallow it."""


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=settings["fd"])
    config = strict.build(RewardConfig, settings["config"], "rewards")
    custom = bool(settings["custom"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which closes its pool
    _leave_nobody(channel, custom)
    _die_with_parent()
    logging.disable(logging.CRITICAL)
    with channel, channel.makefile("rwb") as stream:
        try:
            _prepare(config, custom)
        except CustomRewardError as error:
            _send(stream, {"failed": str(error)})
            return
        _limit(config, custom)
        _send(stream, {"ready": True})
        for line in stream:
            _send(stream, _answer(config, custom, json.loads(line)))


def _prepare(config: RewardConfig, custom: bool) -> None:
    """Everything slow, before the first response: imports, and the caches of the grammar."""
    if custom:
        for rule in config.rules:
            if rule.function is not None:
                load(rule.function)
        return
    warm_up = RewardRule()
    for gold, response in (("x+1", r"\boxed{1+x}"), (r"\frac{\sqrt{3}}{2}", r"\boxed{\sin(\pi/3)}")):
        judge(warm_up, gold, response)
    gc.freeze()  # the grammar's tables are many small objects that never die
    gc.set_threshold(20_000, 20, 20)


def _limit(config: RewardConfig, custom: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if config.memory_mib:
        size = config.memory_mib << 20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    if not custom:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        sys.addaudithook(_refuse)
    signal.signal(signal.SIGPROF, _out_of_time)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Judging reads text. Whatever reaches for the machine was talked into it by a response."""
    if event in _FORBIDDEN:
        raise PermissionError(f"{event} in a reward worker")
    if event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+"):
        raise PermissionError("a reward worker writes no files")


def _out_of_time(_signal: int, _frame: FrameType | None) -> None:
    raise OutOfTime


def _answer(config: RewardConfig, custom: bool, request: dict[str, Any]) -> dict[str, Any]:
    rule = config.rule(request["source"])
    assert rule is not None  # the pool asked before
    try:
        if custom:
            judged = judge_custom(rule, request["source"], request["answer"], request["response"], config.wall_seconds)
        else:
            judged = _timed(config, rule, request["answer"], request["response"], request["cut"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except CustomRewardError as error:
        return {"error": str(error)}
    except Exception:
        # a slip of ours, or of a library, on text that nobody thought of: not a reason to stop a run
        judged = Judgement(0.0, "unparsable", "not understood")
    return {"judgement": asdict(judged)}


def _timed(config: RewardConfig, rule: RewardRule, answer: str, response: str, cut: bool) -> Judgement:
    """CPU time, so that a busy machine changes no verdict. The parent kills what does not listen."""
    signal.setitimer(signal.ITIMER_PROF, config.seconds)
    try:
        judged = judge(rule, answer, response, cut)
        signal.setitimer(signal.ITIMER_PROF, 0)
    except OutOfTime:
        judged = Judgement(0.0, "unparsable", "timeout")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return judged


def _send(stream: Any, message: dict[str, Any]) -> None:
    try:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
    except OSError:
        os._exit(0)  # the trainer is gone


def _leave_nobody(channel: socket.socket, custom: bool) -> None:
    """What a reward function starts must not outlive a trainer that was killed, as this process does not. One more process of
    the group kills the group when its standard input ends. It is nobody's child: a function may wait for all of its own."""
    # the other kinds start nothing; in a group that is not its own, an older version's that still runs, it may end nobody
    if custom and os.getpgrp() == os.getpid():
        if os.fork() == 0:
            if os.fork() == 0:
                channel.close()  # the trainer sees by it that this worker has ended
                while os.read(0, 1):
                    pass
                os.killpg(0, signal.SIGKILL)
            os._exit(0)
        os.wait()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
