"""A run's checkpoints: where it resumes, and its saves one after another. All ranks call, in the same order."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron import checkpoints
from lens_megatron.checkpoints import Broken, CheckpointConfig, Found
from lens_megatron.errors import RunError
from lens_megatron.mcore.agreement import on_rank_0
from lens_megatron.mcore.checkpoint import PendingSave, dtype_of, layout_of, load, save
from lens_megatron.mcore.step import Trainable


@dataclass(frozen=True)
class Resumed:
    step: int
    extra: dict[str, Any]
    folder: Path
    same_rounding: bool  # layout and dtype are those of the run that wrote it
    passed_over: tuple[str, ...]  # newer checkpoints that are damaged, and how: tell the user
    unreadable: tuple[Path, ...]  # those of them that look whole: set them aside


def resume(policy: Trainable, root: Path) -> Resumed | None:
    """Load the newest checkpoint under `root` that is whole; None when there is none. Cleans up after a killed run."""

    def look() -> tuple[list[Found], list[Broken]]:
        checkpoints.clean_leftovers(root)
        return checkpoints.newest_first(root)

    whole, broken = on_rank_0(look)
    unreadable: list[Path] = []
    for found in whole:
        try:
            extra = load(policy, found.folder)
        except RunError as error:  # right sizes, wrong content: the next older one overwrites what was read
            broken.append(Broken(found.folder, str(error)))
            unreadable.append(found.folder)
            continue
        newer = [one.reason for one in broken if one.step > found.manifest.step]
        as_now = (found.manifest.layout, found.manifest.dtype) == (layout_of(policy), dtype_of(policy))
        return Resumed(found.manifest.step, extra, found.folder, as_now, tuple(newer), tuple(unreadable))
    if broken:
        raise checkpoints.no_whole_checkpoint(root, broken)
    return None


class Saver:
    """The saves of one run: one at a time, finished ones pruned."""

    def __init__(
        self,
        policy: Trainable,
        root: Path,
        config: CheckpointConfig,
        companions_from: Path | None = None,
        template: str | None = None,
    ) -> None:
        self._policy = policy
        self._root = root
        self._config = config
        self._companions_from, self._template = companions_from, template
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

    def _ended(self) -> None:
        self._pending = None
        on_rank_0(lambda: checkpoints.prune(self._root, self._config.keep, self._config.keep_best))
