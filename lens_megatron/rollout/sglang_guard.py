"""python -m lens_megatron.rollout.sglang_guard COMMAND...: runs it, and ends it and all that it started when standard
input closes, that is when the process that started this one has gone, however it went.

A server that outlives its run keeps its GPUs; a killed process can end nobody, and its pipes close all the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # the end of standard input is the only word that counts; a handler, because SIG_IGN would pass on to the server
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    code = server.wait()
    _signal(server, signal.SIGKILL)  # what it left behind
    return code if code >= 0 else 128 - code


def _end_with_input(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    _signal(server, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_SECONDS)
    _signal(server, signal.SIGKILL)


def _signal(server: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
