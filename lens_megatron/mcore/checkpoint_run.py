"""A run's checkpoints: where it resumes, and its saves one after another. All ranks call, in the same order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lens_megatron import checkpoints
from lens_megatron.checkpoints import Broken, CheckpointConfig, Damaged, Found, Manifest, Unreadable
from lens_megatron.errors import RunError
from lens_megatron.mcore.agreement import on_rank_0, one_line
from lens_megatron.mcore.checkpoint import COMPLETING_S, PendingSave, dtype_of, layout_of, load, save
from lens_megatron.mcore.checkpoint_reader import looked_at
from lens_megatron.mcore.step import Trainable
from lens_megatron.pruning import Pruner, prune

_T = TypeVar("_T")
_RESCUE_S = 300.0  # for a save under way to be written when the run has failed
_PAUSES_S = (1.0, 3.0)  # before a checkpoint that could not be read is read again


@dataclass(frozen=True)
class Resumed:
    manifest: Manifest
    extra: dict[str, Any]
    folder: Path
    same_rounding: bool  # layout and dtype are those of the run that wrote it
    passed_over: tuple[str, ...]  # newer checkpoints that are damaged, and how: tell the user
    unreadable: tuple[Path, ...]  # those of them that look whole: set them aside

    @property
    def step(self) -> int:
        return self.manifest.step


def resume(policy: Trainable, root: Path) -> Resumed | None:
    """Load the newest checkpoint under `root` that is whole; None when there is none. Cleans up after a killed run."""

    def look() -> tuple[list[Found], list[Broken]]:
        with checkpoints.reading(root):
            checkpoints.clean_leftovers(root)
            return checkpoints.newest_first(root)

    whole, broken = _patiently(lambda: looked_at(look))
    unreadable: list[Path] = []
    for found in whole:
        try:
            extra = _patiently(partial(load, policy, found.folder))
        except Damaged as error:  # right sizes, wrong content: the next older one overwrites what was read
            broken.append(Broken(found.folder, str(error)))
            unreadable.append(found.folder)
            continue
        newer = [one.reason for one in broken if one.step > found.manifest.step]
        as_now = (found.manifest.layout, found.manifest.dtype) == (layout_of(policy), dtype_of(policy))
        return Resumed(found.manifest, extra, found.folder, as_now, tuple(newer), tuple(unreadable))
    if broken:
        raise checkpoints.no_whole_checkpoint(root, broken)
    return None


def _patiently(action: Callable[[], _T]) -> _T:
    """A file server that restarts, a handle gone stale: such an error passes, and would cost the newest checkpoint if it were
    taken for damage. All ranks raise the same, and so try again together."""
    for pause_s in _PAUSES_S:
        try:
            return action()
        except Unreadable as error:
            _on_stderr(f"{error}: trying again in {pause_s:g} s")
            time.sleep(pause_s)
    try:
        return action()
    except Unreadable as error:
        raise RunError(f"{error}; nothing was changed: see to the file system, then resume") from error


def _on_stderr(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


class Saver:
    """The saves of one run: one at a time, finished ones pruned."""

    def __init__(
        self,
        policy: Trainable,
        root: Path,
        config: CheckpointConfig,
        companions_from: Path | None = None,
        template: str | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """`note`: shows what the user should know, on stderr by default; called on every rank, rank 0 alone shows it."""
        self._policy = policy
        self._root = root
        self._config = config
        self._companions_from, self._template = companions_from, template
        self._note = note or _on_stderr
        self._old = Pruner("checkpoints", self._note)
        self._pending: PendingSave | None = None

    def due(self, step: int, last: bool = False) -> bool:
        return last or (self._config.every > 0 and step % self._config.every == 0)

    def save(self, step: int, extra: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> float:
        """Seconds that training had to wait."""
        start = time.monotonic()
        self.finish()
        self._pending = save(
            self._policy,
            checkpoints.step_folder(self._root, step),
            extra,
            self._config.asynchronous,
            step=step,
            metrics=metrics,
            companions_from=self._companions_from,
            template=self._template,
        )
        self.poll()
        return time.monotonic() - start

    def poll(self) -> None:
        """Every step, on all ranks."""
        if self._pending is not None and self._pending.done():
            self._ended()

    def finish(self) -> None:
        """Before the run ends, and before the next save."""
        if self._pending is not None:
            if not self._pending.wait(self._config.timeout_s):
                raise RunError(
                    f"{self._pending.folder}: the other ranks waited for rank {self._pending.still_writing} to write its "
                    f"part, for checkpoint.timeout_s = {self._config.timeout_s:g} s: its file system does not answer; "
                    "earlier checkpoints are untouched"
                )
            self._ended()

    @property
    def rescue_limit_s(self) -> float:
        """What `rescue` takes at most, if the file system answers."""
        return self._patience_s + 2 * COMPLETING_S

    @property
    def _patience_s(self) -> float:
        return min(self._config.timeout_s, _RESCUE_S)

    def rescue(self) -> None:
        """After an error that ends the run, which perhaps not every rank met: a save that was under way is completed where it
        can be, and is what the run goes on from. Waits for no rank that does not come."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            if pending.rescue(self._patience_s):
                self._note(f"{pending.folder.name} was being written when the run failed, and is complete")
        except Exception as error:  # the reason that is under way is the one to end with
            self._note(f"{pending.folder.name} was being written when the run failed: {one_line(error)}")

    def _ended(self) -> None:
        self._pending = None
        on_rank_0(lambda: self._old.attempt(lambda: prune(self._root, self._config.keep, self._config.keep_best)))
