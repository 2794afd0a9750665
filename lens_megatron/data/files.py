"""Raw rows from JSONL, Parquet, saved Hugging Face datasets and the hub, each with the place it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_megatron import strict
from lens_megatron.errors import UsageError

RawRow = tuple[str, dict[str, Any]]  # where (file and line or row), columns
FILE_KINDS = (".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARQUET_BATCH = 1024
_SPLITS = ("train", "test", "validation", "valid", "dev")


def read_files(source: str, split: str = "train") -> Iterator[RawRow]:
    for path in find_files(source, split):
        if path.suffix == ".jsonl":
            yield from strict.read_json_lines(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _arrow(path)


def find_files(source: str, split: str) -> list[Path]:
    """The files of a split, in the order in which they are read."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise UsageError(f"{source}: data is read from .jsonl and .parquet files, not from {path.suffix or 'this'}")
        return [path]
    if path.is_dir():
        return _in_folder(path, split)
    if is_hub_id(source):
        return _in_folder(_download(source), split)
    raise UsageError(f"{source}: no such file or folder, and not a hub id of the form owner/name")


def check_source(source: str, split: str) -> None:
    """Refuses what is not there, without reading it; what may be on the hub is not asked for."""
    if not is_hub_id(source):
        find_files(source, split)


def is_hub_id(source: str) -> bool:
    """Of a data set that may be on the hub: nothing here has that name. `data/train.jsonl` is a file that is not there."""
    if Path(source).expanduser().exists() or Path(source).suffix in FILE_KINDS:
        return False
    return _HUB_ID.fullmatch(source) is not None and not source.startswith((".", "/"))


def _in_folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():  # datasets' save_to_disk of several splits: one folder each
        if not (folder / split).is_dir():
            raise UsageError(f"{folder}: no split {split!r}; it has {', '.join(_folders(folder))}")
        folder = folder / split
    if (folder / "state.json").is_file():
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
        return [folder / name for name in names]
    files = sorted(path for path in folder.rglob("*") if path.suffix in FILE_KINDS)
    if not files:
        raise UsageError(f"{folder}: no .jsonl or .parquet file in it")
    of_split = [path for path in files if _split_of(path, folder) == split]
    of_any_split = [path for path in files if _split_of(path, folder) is not None]
    if of_any_split and not of_split:
        found = sorted({str(_split_of(path, folder)) for path in of_any_split})
        raise UsageError(f"{folder}: no files of split {split!r}; it has {', '.join(found)}")
    return of_split or files


def _split_of(path: Path, folder: Path) -> str | None:
    """train-00000-of-00002.parquet, main/train/0.parquet and gsm8k_train.jsonl all belong to train."""
    words = re.split(r"[^a-z]+", str(path.relative_to(folder).with_suffix("")).lower())
    return next((word for word in words if word in _SPLITS), None)


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{hub_id}: no such file, and the hub did not give it ({reason})") from None


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _arrow(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: not an Arrow stream ({str(error).splitlines()[0]})") from None
