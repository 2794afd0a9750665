"""Checkpoint folders of a run: names, what makes one whole, which to resume from, which to keep. No model code.

A checkpoint is written as `step_000020.partial` and renamed to `step_000020` when everything is in it, the manifest last.
Whoever finds `step_000020` with a manifest whose files have their sizes finds a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lens_megatron.errors import RunError, UsageError

MANIFEST = "manifest.json"
FORMAT = "lens-megatron/1"  # changes when an older version can no longer read what is written
_STEP = re.compile(r"step_(\d{6,})")
# Names that nobody mistakes for a checkpoint: being written; replaced by a newer one of the same step; being removed;
# found damaged by a run that went on from an older one.
_PARTIAL, _REPLACED, _REMOVED, _DAMAGED = ".partial", ".replaced", ".removed", ".damaged"
# What reading gives where content is not as it was written: not there, of another kind, or an index that points before a
# file's start; torch's own errors, of bytes that it has, have no number. Any other is the file system's.
_OF_CONTENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EOVERFLOW)


class Damaged(RunError):
    """The content of a checkpoint is wrong: reading it again will not help, an older one may stand in."""


class Unreadable(RunError):
    """The file system did not answer, or refused: whether the checkpoint is good is not known."""


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint:` of RUN.yaml."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    every: int = 20  # steps; 0: only after the last step
    keep: int = 3  # newest ones kept
    keep_best: str | None = None  # also keep the one with the highest value of this metric
    timeout_s: float = 3600.0  # to write one; longer, and the run ends
    asynchronous: bool = True  # written in the background while training goes on; costs a copy in host memory
    hf_every: int = 0  # steps between copies of the weights as HF folders, run_dir/hf/step_000020; 0: none
    hf_keep: int | None = None  # newest ones kept; null: all

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must be 0 or more (got {self.every})")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is above 0 (got {self.timeout_s})")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1 (got {self.keep})")
        if self.hf_every < 0:
            raise ValueError(f"hf_every must be 0 or more (got {self.hf_every})")
        if self.hf_keep is not None and self.hf_keep < 1:
            raise ValueError(f"hf_keep must be at least 1, or null for all (got {self.hf_keep})")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; written last, so that its presence says that the rest is there."""

    step: int
    model: dict[str, Any]  # ModelSpec
    layout: dict[str, Any]  # of the run that wrote it: tp, pp, ...
    world_size: int
    dtype: str
    optimizer: bool  # optimizer, schedule and random states are in it too
    files: dict[str, int]  # name -> bytes
    metrics: dict[str, float] = field(default_factory=dict)
    version: str = ""  # of lens-megatron
    format: str = FORMAT


@dataclass(frozen=True)
class Found:
    """A checkpoint that looks whole."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Broken:
    """A folder with a checkpoint's name that cannot be one."""

    folder: Path
    reason: str

    @property
    def step(self) -> int:
        return step_of(self.folder)


def step_name(step: int) -> str:
    """Of everything that a run keeps of one step: checkpoints and rollouts."""
    return f"step_{step:06d}"


def step_folder(root: Path, step: int) -> Path:
    return root / step_name(step)


def begin(folder: Path) -> Path:
    """An empty folder to write into, invisible as a checkpoint."""
    partial = folder.with_name(folder.name + _PARTIAL)
    with _disk_errors(folder):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def abandon(folder: Path) -> None:
    """Remove what `begin` and the writers left; frees the disk that ran full."""
    shutil.rmtree(folder.with_name(folder.name + _PARTIAL), ignore_errors=True)


def complete(folder: Path, manifest: Manifest) -> None:
    """Make the partial folder of `folder` a checkpoint. All its files are on disk already."""
    partial = folder.with_name(folder.name + _PARTIAL)
    with _disk_errors(folder):
        write_file(partial / MANIFEST, (json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n").encode())
        publish(folder)


def publish(folder: Path) -> None:
    """Give the partial folder of `folder` its name. All its files are on disk already."""
    partial = folder.with_name(folder.name + _PARTIAL)
    for directory in {path.parent for path in partial.rglob("*")} | {partial}:
        sync(directory)
    old = folder.with_name(folder.name + _REPLACED)
    if folder.exists():  # a run that went back to an earlier checkpoint arrives here again
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: bytes) -> int:
    """Written and on disk; its size."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content)


def sync(path: Path) -> None:
    """A file's content, and the names in a folder, survive a power cut only after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """Raise UsageError unless `folder` is a checkpoint of ours, of a format that this version reads."""
    with reading(folder):
        there = folder.is_dir()
    if not there:
        raise UsageError(f"{folder}: no such folder")
    try:
        with reading(folder / MANIFEST):
            tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder}: not a checkpoint of lens-megatron: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / MANIFEST}: not readable ({error})") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise UsageError(f"{folder}: format {found!r}, this version reads {FORMAT!r}; use the version that wrote it")
    try:
        return Manifest(**tree)
    except TypeError as error:
        raise UsageError(f"{folder / MANIFEST}: {error}") from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """OSErrors that say nothing of the content become Unreadable; the others are left to the caller."""
    try:
        yield
    except OSError as error:
        if is_of_content(error):
            raise
        raise unreadable(path, error) from None


def is_of_content(error: OSError) -> bool:
    return error.errno in _OF_CONTENT


def unreadable(path: Path, error: OSError) -> Unreadable:
    """`path`: for an error that does not say which."""
    return Unreadable(f"{error.filename or path} cannot be read: {error.strerror or error}")


def damage(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is missing or has another size than when it was written; None when whole."""
    for name, size in manifest.files.items():
        try:
            with reading(folder / name):
                actual = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual:,} bytes, {size:,} were written"
    return None


def newest_first(root: Path) -> tuple[list[Found], list[Broken]]:
    """Checkpoints that look whole; and, of those that do not, what is wrong. Raises Unreadable where nobody can tell."""
    whole: list[Found] = []
    broken: list[Broken] = []
    with reading(root):
        candidates = folders(root)
    for folder in sorted(candidates, key=step_of, reverse=True):
        try:
            manifest = read_manifest(folder)
        except UsageError as error:
            broken.append(Broken(folder, str(error)))
            continue
        reason = damage(folder, manifest)
        if reason is None:
            whole.append(Found(folder, manifest))
        else:
            broken.append(Broken(folder, f"{folder}: damaged: {reason}"))
    return whole, broken


def latest(root: Path) -> Found | None:
    """The newest whole checkpoint; None when there is nothing to resume. Broken ones alone are an error, not a new start."""
    whole, broken = newest_first(root)
    if not whole and broken:
        raise no_whole_checkpoint(root, broken)
    return whole[0] if whole else None


def no_whole_checkpoint(root: Path, broken: Sequence[Broken]) -> RunError:
    reasons = "; ".join(one.reason for one in broken)
    return RunError(f"{root}: no checkpoint can be loaded ({reasons}); restore one, or move them away to start over")


def clean_leftovers(root: Path) -> list[str]:
    """Remove what a killed run left half done. Only before any writer has started."""
    removed = []
    for folder in sorted(root.glob("step_*")) if root.is_dir() else []:
        base, suffix = folder.with_suffix(""), folder.suffix
        if not _STEP.fullmatch(base.name) or suffix not in (_PARTIAL, _REPLACED, _REMOVED):
            continue
        if suffix == _REPLACED and not base.exists():
            folder.rename(base)  # killed between the two renames: the old one is still the checkpoint of its step
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder.name)
    return removed


def set_aside(folder: Path) -> Path:
    """For a checkpoint that could not be loaded. Its sizes may be right: left in place it would count as the newest, and the
    good ones be pruned for it."""
    names = (folder.with_name(f"{folder.name}{_DAMAGED}{number or ''}") for number in itertools.count())
    aside = next(name for name in names if not name.exists())
    try:
        folder.rename(aside)
    except OSError as error:
        raise RunError(f"{folder}: damaged, and not renamed ({error.strerror}); move it away, then resume") from None
    return aside


def remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + _REMOVED)
    folder.rename(doomed)  # so that a kill in the middle of removing leaves no half checkpoint
    shutil.rmtree(doomed, ignore_errors=True)


def check_same_model(folder: Path, manifest: Manifest, model: Mapping[str, Any]) -> None:
    different = [name for name in model if manifest.model.get(name) != _as_json(model[name])]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more differences)" if len(different) > 1 else ""
        raise UsageError(
            f"{folder}: holds another model: {name} is {manifest.model.get(name)!r} there, {model[name]!r} here{more}"
        )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise failed_to_write(folder, error.strerror or str(error)) from None


def failed_to_write(folder: Path, reason: str) -> RunError:
    return RunError(
        f"{folder}: the checkpoint was not written ({reason}); free space or change run_dir, then resume: "
        "earlier checkpoints are untouched"
    )
