"""SGLang servers on other nodes of a launched job: asked for through the run folder, where a supervisor answers.

launchers/supervisor.py is the other side, and says what is in which file.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from lens_megatron.errors import RunError
from lens_megatron.rollout.sglang_server import ServerProcess, write_private

FOLDER = "LENS_MEGATRON_SERVERS"  # set by the batch script of a job that has supervisors
_POLL_S = 0.2
_TRIES = 10


def supervised_folder() -> Path | None:
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


class SupervisedServer(ServerProcess):
    """A server whose process belongs to its node's supervisor."""

    def start(self) -> None:
        """Returns when its supervisor has taken it up: only then is its address known."""
        self.starts += 1
        self._ask(stop=False)
        deadline = time.monotonic() + self._config.start_timeout_s
        while (state := self._state()) is None or not state["url"]:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{self.name}: no supervisor took it up within start_timeout_s = {self._config.start_timeout_s:g}; "
                    f"see servers-*.out in {self.log.parent}"
                )
            time.sleep(_POLL_S)
        self.url = state["url"]

    @property
    def shares_memory(self) -> bool:
        return False  # it may be on another node

    @property
    def has_ended(self) -> bool:
        state = self._state()
        return state is None or bool(state["ended"])

    @property
    def exit_code(self) -> int | None:
        state = self._state()
        return None if state is None else state["exit_code"]

    def stop(self) -> None:
        if self.starts:
            self.starts += 1
            self._ask(stop=True)

    def _ask(self, stop: bool) -> None:
        folder = supervised_folder()
        assert folder is not None
        config = self._config
        own = [config.python, "-m", "sglang.launch_server"] if config.python else None
        tree = {
            "start": self.starts,
            "stop": stop,
            "gpus": config.gpus,
            "command": list(config.command) or own,  # null: the supervisor's own Python has sglang
            "env": config.env,
            "log": str(self.log),
            "settings": self.settings(),
        }
        path = folder / f"{self.name}.request"
        partial = path.with_name(path.name + ".partial")
        folder.mkdir(parents=True, exist_ok=True)
        write_private(partial, json.dumps(tree))
        partial.replace(path)

    def _state(self) -> dict[str, Any] | None:
        """Of this start."""
        folder = supervised_folder()
        assert folder is not None
        state = json.loads(_text(folder / f"{self.name}.state") or "null")
        return state if state is not None and state["start"] == self.starts else None


def _text(path: Path) -> str | None:
    for _ in range(_TRIES):
        try:
            return path.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:  # NFS, of a file that was replaced meanwhile: the new one is there
            if error.errno != errno.ESTALE:
                raise
    return None
