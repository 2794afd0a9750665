"""What an attacker would plant in a checkpoint of Megatron's format, whose loader unpickles whatever it finds."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lens_megatron.mcore import checkpoint_index

Plant = Callable[[Path, Path], str]  # (checkpoint, what the payload makes when it runs) -> the words of the refusal


class Payload:
    """What an attacker would plant: unpickling it runs a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.proof}",))


def resize_in_manifest(checkpoint: Path, name: str) -> None:
    """The attacker's files have the sizes that the manifest says."""
    file = checkpoint / "manifest.json"
    tree = json.loads(file.read_text())
    tree["files"][name] = (checkpoint / name).stat().st_size
    file.write_text(json.dumps(tree))


def planted_in_index(checkpoint: Path, proof: Path) -> str:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    found.planner_data = Payload(proof)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))
    resize_in_manifest(checkpoint, ".metadata")
    return ".metadata: asks for posix.system"


def planted_in_common(checkpoint: Path, proof: Path) -> str:
    torch.save({"trainer": Payload(proof)}, checkpoint / "common.pt")
    resize_in_manifest(checkpoint, "common.pt")
    return "common.pt: holds more than plain values"


def planted_in_an_object(checkpoint: Path, proof: Path) -> str:
    """In place of a layer's empty state, among the tensors."""
    chunk = _an_object(checkpoint)
    content = io.BytesIO()
    torch.save([Payload(proof)], content)
    with (checkpoint / chunk.file).open("r+b") as file:
        file.seek(0, os.SEEK_END)
        place = file.tell()
        file.write(content.getvalue())
    resize_in_manifest(checkpoint, chunk.file)
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in found.storage_data.values():
        if (info.relative_path, info.offset) == (chunk.file, chunk.offset):
            info.offset, info.length = place, len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))
    resize_in_manifest(checkpoint, ".metadata")
    return "_extra_state/shard_"


def unpickle_carelessly(checkpoint: Path, plant: Plant) -> None:
    """As Megatron would, to show that the payload is a real one."""
    if plant is planted_in_index:
        pickle.loads((checkpoint / ".metadata").read_bytes())
    elif plant is planted_in_common:
        torch.load(checkpoint / "common.pt", weights_only=False)
    else:
        for entry in pickle.loads((checkpoint / ".metadata").read_bytes()).storage_data.values():
            content = (checkpoint / entry.relative_path).read_bytes()[entry.offset : entry.offset + entry.length]
            torch.load(io.BytesIO(content), weights_only=False)


def _an_object(checkpoint: Path) -> checkpoint_index.Chunk:
    return next(entry.chunks[0] for entry in checkpoint_index.read(checkpoint).values() if entry.dtype is None)
