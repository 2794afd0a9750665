"""Which checkpoints and HF copies of a run are removed when newer ones stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lens_megatron.checkpoints import MANIFEST, Found, folders, newest_first, reading, remove, step_of
from lens_megatron.errors import RunError


def prune(root: Path, keep: int, keep_best: str | None = None) -> list[str]:
    """Remove all checkpoints but the newest `keep` and the best. Broken ones go once a newer whole one stands; they never
    count."""
    whole, _ = newest_first(root)
    if not whole:
        return []
    spared = {found.folder for found in whole[: max(1, keep)]}
    if keep_best is not None and (top := best(whole, keep_best)) is not None:
        spared.add(top.folder)
    newest = whole[0].manifest.step
    with reading(root):
        ours = [folder for folder in folders(root) if step_of(folder) <= newest and (folder / MANIFEST).is_file()]
    return _remove_all(folder for folder in ours if folder not in spared)


def prune_hf(root: Path, keep: int, step: int) -> list[str]:
    """Remove HF copies but the newest `keep` up to `step`."""
    return _remove_all(sorted((one for one in folders(root) if step_of(one) <= step), key=step_of)[:-keep])


def best(found: Sequence[Found], metric: str) -> Found | None:
    """The highest finite value of `metric`; of equal ones the newest."""
    scored = [f for f in found if math.isfinite(f.manifest.metrics.get(metric, math.nan))]
    return max(scored, key=lambda f: (f.manifest.metrics[metric], f.manifest.step), default=None)


def _remove_all(doomed: Iterable[Path]) -> list[str]:
    """The names of those removed. Raises RunError of one that could not be, when the others are."""
    removed, left = [], []
    for folder in sorted(doomed, key=step_of):
        try:
            remove(folder)
        except OSError as error:
            left.append(f"{folder}: not removed: {error.strerror or error}")
        else:
            removed.append(folder.name)
    if left:
        raise RunError(f"{left[0]}{f' (and {len(left) - 1} more)' if len(left) > 1 else ''}")
    return removed


class Pruner:
    """Prunes while a run goes on: what is in the way of it costs disk, and not the run."""

    def __init__(self, what: str, note: Callable[[str], None]) -> None:
        self._what, self._note = what, note
        self._told = ""

    def attempt(self, pruning: Callable[[], object]) -> None:
        try:
            pruning()
        except (OSError, RunError) as error:
            if str(error) != self._told:  # once, and not after every save
                self._note(f"old {self._what} stay, the run goes on: {error}")
            self._told = str(error)
