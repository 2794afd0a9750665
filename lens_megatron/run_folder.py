"""A run's folder: what the loop writes and the report reads. Only rank 0 writes.

    config.yaml      as resolved          metrics.jsonl                  one JSON object a step
    versions.json    software, machine    rollouts/step_000012.parquet   one row a rollout
    ending.json      how it ended         checkpoints/step_000020/       written by the checkpoint code
    logs/                                 evaluations/step_000020.jsonl  one answer to a held-out problem a line

A file is complete or absent: written beside its place, then renamed. metrics.jsonl grows by whole lines; a failed write
is undone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from lens_megatron.checkpoints import step_name
from lens_megatron.errors import RunError, UsageError
from lens_megatron.files import append_line, replace_file, replace_text, take_lock
from lens_megatron.machine import machine_and_versions
from lens_megatron.rollout_table import ROLLOUT_COLUMNS, RolloutRow, rollout_table

Ending = Literal["done", "stopped", "unfinished", "failed"]
_UNTIL_STEP = "# in force until step "  # begins a configuration that a resumed run has changed


class RunFolder:
    """Use `create` or `resume` to write, `open` to read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """A folder without a run in it; what else lies there (a launcher's logs) stays."""
        folder = cls(path)
        folder._prepare()
        try:
            folder.check_is_new()
        except UsageError:
            folder.close()
            raise
        return folder

    @classmethod
    def resume(cls, path: str | Path, patience_s: float = 0.0) -> RunFolder:
        """A folder with a run in it. Call `rewind` with the step of the checkpoint that was loaded. `patience_s`: for an
        earlier life of the same job to let go of it."""
        folder = cls(path)
        folder.check_is_run()
        folder._prepare(patience_s)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """To read only. The run may be under way."""
        folder = cls(path)
        if not folder.path.is_dir():
            raise UsageError(f"{folder.path}: no such run folder")
        if not folder.metrics_path.exists():
            raise UsageError(f"{folder.path} is not a run folder with a finished step: it has no metrics.jsonl")
        return folder

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def holds_run(self) -> bool:
        files = any((self.path / name).exists() for name in ("config.yaml", "metrics.jsonl"))
        folders = (self.path / "rollouts", self.path / "checkpoints")
        return files or any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    def check_is_new(self) -> None:
        if self.holds_run():
            raise UsageError(
                f"run_dir {self.path} already holds a run: go on with it by --resume, or choose another run_dir"
            )

    def check_is_run(self) -> None:
        if not self.holds_run():
            raise UsageError(
                f"run_dir {self.path} holds no run to resume: start one without --resume, or with --continue"
            )

    # --- places

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _lock_path(self) -> Path:
        return self.path / "run.lock"

    @property
    def _ending_path(self) -> Path:
        return self.path / "ending.json"

    def rollouts_path(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step_name(step)}.parquet"

    def evaluation_path(self, step: int) -> Path:
        return self.path / "evaluations" / f"{step_name(step)}.jsonl"

    # --- writing

    def write_config(self, tree: Mapping[str, Any], step: int | None = None) -> None:
        """The resolved configuration. A resumed run's earlier one, if it differs, is kept beside it, with the `step` that
        it was in force until."""
        import yaml

        text = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
        self._write_kept("config.yaml", text, "" if step is None else f"{_UNTIL_STEP}{step}\n")

    def write_versions(self, **more: Any) -> None:
        """What runs, and where. `more`: what only the caller knows, such as the number of processes."""
        tree = {**machine_and_versions(), **more}
        self._write_kept("versions.json", json.dumps(tree, indent=1) + "\n")

    def begin(self, config: Mapping[str, Any], step: int = 0) -> None:
        """The run starts, or goes on after `step`: from now on the folder is that of `config`."""
        self._ending_path.unlink(missing_ok=True)
        self.write_config(config, step)
        self.write_versions()

    def write_ending(self, state: Ending, reason: str = "") -> None:
        """How it ended, for `status`: a run on this machine has no scheduler that remembers."""
        text = json.dumps({"state": state, "reason": reason}) + "\n"
        with _writing(self._ending_path):
            replace_text(self._ending_path, text)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line, on disk. A number that is not finite becomes null: NaN is no JSON."""
        if "step" not in metrics:
            raise ValueError("metrics of a step name it: no 'step'")
        line = json.dumps({name: _finite(value) for name, value in metrics.items()}, allow_nan=False) + "\n"
        with _writing(self.metrics_path), self.metrics_path.open("ab", buffering=0) as file:
            append_line(file, line.encode(), on_disk=True)

    def write_rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        import pyarrow.parquet as pq

        table = rollout_table(rows)

        path = self.rollouts_path(step)
        with _writing(path):
            replace_file(path, lambda file: pq.write_table(table, file, compression="zstd"))

    def write_evaluation(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        path = self.evaluation_path(step)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(answer).encode() + b"\n" for answer in answers]
        with _writing(path):
            replace_file(path, lambda file: file.writelines(lines))

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, the checkpoint's: the steps from there on will be made again."""
        kept = [line for line, tree in self._metric_lines() if tree["step"] <= step]
        with _writing(self.metrics_path):
            replace_file(self.metrics_path, lambda file: file.writelines(kept))
        for later in self.rollout_steps():
            if later > step:
                self.rollouts_path(later).unlink()
        for path in self.path.glob("evaluations/step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    # --- reading

    def read_config(self) -> dict[str, Any]:
        from lens_megatron import strict

        path = self.path / "config.yaml"
        return strict.read_yaml(path) if path.exists() else {}

    def read_earlier_configs(self) -> list[tuple[int | None, dict[str, Any]]]:
        """Of a run that was resumed with changes, in order, each with the step that it was in force until. None: older
        versions did not say."""
        from lens_megatron import strict

        numbered = {
            int(number): path
            for path in self.path.glob("config.*.yaml")
            if (number := path.name.split(".")[1]).isdecimal()
        }
        return [(_until_step(path), strict.read_yaml(path)) for _, path in sorted(numbered.items())]

    def read_versions(self) -> dict[str, Any]:
        path = self.path / "versions.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def read_ending(self) -> tuple[Ending, str] | None:
        """State and reason; None: it runs, or was killed."""
        if not self._ending_path.exists():
            return None
        tree = json.loads(self._ending_path.read_text(encoding="utf-8"))
        return tree["state"], tree["reason"]

    def read_metrics(self) -> list[dict[str, Any]]:
        """By step. A last line that is still being written is left out."""
        return [tree for _, tree in self._metric_lines()]

    def rollout_steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step_")) for path in self.path.glob("rollouts/step_*.parquet"))

    def read_rollout_columns(
        self, step: int, columns: Sequence[str] = ROLLOUT_COLUMNS, prompt_ids: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Some columns, of some prompts: a step of a large run holds a million tokens."""
        import pyarrow
        import pyarrow.parquet as pq

        path = self.rollouts_path(step)
        chosen = None if prompt_ids is None else [("prompt_id", "in", list(prompt_ids))]
        try:
            return pq.read_table(path, columns=list(columns), filters=chosen).to_pylist()
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise RunError(f"{path} cannot be read: {error}") from None

    def _metric_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                tree = json.loads(line)
                int(tree["step"])
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{self.metrics_path}:{number}: not a JSON object with a step") from None
            yield line, tree

    # --- the folder itself

    def _prepare(self, patience_s: float = 0.0) -> None:
        try:
            for folder in (self.path, self.path / "rollouts", self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_path.open("a")
        except OSError as error:
            raise UsageError(f"run_dir {self.path} cannot be written: {error.strerror}; choose another") from None
        self._take_lock(self._lock, time.monotonic() + patience_s)
        now = time.time()  # by the clock of this node, as the flight recorder's
        with suppress(OSError):  # another user's file, in a folder that both may write
            os.utime(self._lock_path, (now, now))
        for leftover in self.path.glob("**/.*.partial"):
            leftover.unlink(missing_ok=True)

    def _take_lock(self, lock: IO[str], deadline: float) -> None:
        """Two runs in one folder (a requeued job whose first life still breathes) would mix their files."""
        while not take_lock(lock):
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"run_dir {self.path} is in use by another running process: stop it, or choose another run_dir"
                )
            time.sleep(0.2)

    def in_use(self) -> bool:
        """Whether a process of this machine (of all machines, where the file system carries locks) runs in it."""
        try:
            with self._lock_path.open("r+") as lock:
                return not take_lock(lock)
        except PermissionError:  # another user's, who may well run in it
            return True
        except OSError:  # no such file
            return False

    def taken_at(self) -> float:
        """When the process that runs in it, or did last, took it: seconds since the epoch."""
        return self._lock_path.stat().st_mtime if self._lock_path.exists() else 0.0

    def _write_kept(self, name: str, text: str, note: str = "") -> None:
        """`note`: goes before an earlier text that is kept."""
        path = self.path / name
        if path.exists() and (earlier := path.read_text(encoding="utf-8")) != text:
            stem, _, ending = name.partition(".")
            used = {other.name for other in self.path.glob(f"{stem}.*.{ending}")}
            number = next(n for n in range(1, len(used) + 2) if f"{stem}.{n}.{ending}" not in used)
            kept = self.path / f"{stem}.{number}.{ending}"
            with _writing(kept):
                replace_text(kept, note + earlier)
        with _writing(path):
            replace_text(path, text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"writing {path}: {reason}; what was written before is whole: make room, then resume") from None


def _until_step(path: Path) -> int | None:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    number = first.removeprefix(_UNTIL_STEP)
    return int(number) if number != first and number.isdecimal() else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
