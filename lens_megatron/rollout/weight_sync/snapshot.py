"""A server that was restarted while the trainer cannot send: brought back from the last version written to disk.

Runs in the rollout driver's process, in a thread, while others generate. Only weights that the trainer has proved count,
and only those of the very sync that the other servers have theirs from: its label is drawn anew for every attempt, so
that no folder of an earlier life of the run, or of another run, can pass for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import RunError
from lens_megatron.files import replace_text
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient
from lens_megatron.rollout.weight_sync.fleet import unfinished
from lens_megatron.rollout.weight_sync.probe import Bound, Probe

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_server import ServerAddress
    from lens_megatron.rollout.weight_sync.config import SyncConfig

PROOF = "proved.json"  # beside the weights: the probe and the log-probs that it must have


def snapshot_folder(config: SyncConfig, run_dir: Path) -> Path:
    """The run's own; in a folder that is given it has a part of its own, for other runs may be given the same."""
    if not config.folder:
        return run_dir / "weights"
    where = run_dir.resolve()
    return Path(config.folder) / f"{where.name}-{hashlib.sha256(str(where).encode()).hexdigest()[:8]}"


def forget_snapshots(folder: Path) -> None:
    """Of an earlier life of the run."""
    for old in folder.glob("version_*"):
        shutil.rmtree(old, ignore_errors=True)


def version_folder(folder: Path, version: int) -> Path:
    return folder / f"version_{version:06d}"


def write_proof(folder: Path, label: str, probe: Probe) -> None:
    """By the trainer, when every check of this version has passed."""
    replace_text(folder / PROOF, json.dumps({"label": label, "probe": asdict(probe)}))


def _read_proof(tree: Mapping[str, Any]) -> Probe:
    return Probe(tuple(tree["tokens"]), tuple(tree["logprobs"]), Bound(**tree["bound"]))


class Snapshots:
    """Versions in the folder of rollout.sync's disk transport. Picklable: handed to the rollout driver."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self._folder, self._timeout_s = folder, timeout_s

    def resync(self, address: ServerAddress, version: int, label: str) -> None:
        folder = version_folder(self._folder, version)
        proof = json.loads((folder / PROOF).read_text()) if (folder / PROOF).exists() else {}
        if proof.get("label") != label:
            raise RunError(f"there is no snapshot of version {version} to bring it back from")
        loop = EventLoop("resync")
        try:
            loop.run(_load(SGLangClient(address.url, address.api_key, self._timeout_s), folder, proof))
        finally:
            loop.close()


async def _load(client: SGLangClient, folder: Path, proof: dict[str, Any]) -> None:
    try:
        label = proof["label"]
        await client.update_weights_from_disk(str(folder.resolve()), unfinished(label))
        probe = _read_proof(proof["probe"])
        answer, _ = await client.prompt_logprobs(f"resync/{label}/", probe.tokens)
        if complaint := probe.complaint(answer):
            raise RunError(f"{client.url}: after reloading {folder.name} {complaint}")
        await client.set_weight_version(label)
    finally:
        await client.close()
