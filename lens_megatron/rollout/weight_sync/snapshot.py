"""A server that was restarted while the trainer cannot send: brought back from the last version written to disk.

Runs in the rollout driver's process, in a thread, while others generate. Only a folder whose ledger the trainer has
proved counts, and only of the version that the other servers have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_megatron.errors import RunError
from lens_megatron.rollout.event_loop import EventLoop
from lens_megatron.rollout.sglang_client import SGLangClient

if TYPE_CHECKING:
    from lens_megatron.rollout.sglang_server import ServerAddress
    from lens_megatron.rollout.weight_sync.config import SyncConfig

PROOF = "proved.json"  # beside the weights: the probe and the log-probs that it must have


def snapshot_folder(config: SyncConfig, run_dir: Path) -> Path:
    return Path(config.folder) if config.folder else run_dir / "weights"


def version_folder(folder: Path, version: int) -> Path:
    return folder / f"version_{version:06d}"


def write_proof(folder: Path, version: int, probe: Sequence[int], logprobs: Sequence[float], tolerance: float) -> None:
    """By the trainer, when every check of this version has passed."""
    tree = {"version": version, "probe": list(probe), "logprobs": list(logprobs), "tolerance": tolerance}
    partial = folder / f".{PROOF}.partial"
    partial.write_text(json.dumps(tree))
    partial.replace(folder / PROOF)


class Snapshots:
    """Versions in the folder of rollout.sync's disk transport. Picklable: handed to the rollout driver."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self._folder, self._timeout_s = folder, timeout_s

    def resync(self, address: ServerAddress, version: int) -> None:
        folder = version_folder(self._folder, version)
        if not (folder / PROOF).exists():
            raise RunError(f"there is no snapshot of version {version} to bring it back from")
        proof = json.loads((folder / PROOF).read_text())
        loop = EventLoop("resync")
        try:
            loop.run(_load(SGLangClient(address.url, address.api_key, self._timeout_s), folder, version, proof))
        finally:
            loop.close()


async def _load(client: SGLangClient, folder: Path, version: int, proof: dict[str, Any]) -> None:
    try:
        await client.update_weights_from_disk(str(folder.resolve()), f"unfinished-{version}")
        probe, expected = proof["probe"], proof["logprobs"]
        answer, _ = await client.prompt_logprobs(f"resync/{version}/", probe)
        worst = max(abs(a - b) for a, b in zip(answer, expected, strict=True))
        if not worst <= proof["tolerance"]:
            raise RunError(f"{client.url}: after reloading version {version} the probe differs by {worst:.3g}")
        await client.set_weight_version(str(version))
    finally:
        await client.close()
