"""Weights as an HF folder of safetensors that trainer and servers both see; also what a server is brought back from.

The newest two versions are kept: a server may still be reading the older one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens_megatron.fingerprints import fingerprint
from lens_megatron.mcore.hf_bridge import exhaust
from lens_megatron.mcore.hf_files import write_hf_folder
from lens_megatron.rollout.weight_sync.delivery import Delivery, Noted
from lens_megatron.rollout.weight_sync.fleet import Fleet, SyncFailed
from lens_megatron.rollout.weight_sync.probe import Probe
from lens_megatron.rollout.weight_sync.snapshot import version_folder, write_proof

KEPT = 2


class DiskTransport:
    name = "disk"

    def __init__(self, folder: Path, companions_from: Path) -> None:
        self._folder, self._companions_from = folder, companions_from

    def transfer(self, delivery: Delivery) -> None:
        tensors = delivery.tensors(None, root=0, device=torch.device("cpu"))
        try:
            if dist.get_rank() == 0:
                self._write_and_tell(delivery, tensors)
        finally:
            exhaust(tensors)

    def _write_and_tell(self, delivery: Delivery, tensors: Iterator[tuple[str, Tensor]]) -> None:
        fleet, ledger = delivery.fleet, delivery.ledger
        assert fleet is not None and ledger is not None
        noted = Noted([], delivery.checksums)
        target = self.version_folder(delivery.version)
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that failed
        try:
            write_hf_folder(target, noted.passing(tensors, {}), self._companions_from, delivery.most_bytes)
        except (OSError, SafetensorError) as error:
            raise SyncFailed(f"{target} could not be written: {error}") from None
        ledger.add(noted.entries)
        # the fleet flushed what can be flushed; with rollouts in place the server would end for not being able to
        in_place = delivery.config.in_flight == "in_place"
        folder = str(target.resolve())
        answers = fleet.each(
            lambda server: server.update_weights_from_disk(folder, delivery.unfinished, flush_cache=not in_place)
        )
        for url in answers:
            ledger.acknowledge(url, 0)
        ledger.sent(_read_again(target))
        fleet.need_one()
        self._forget_old(delivery.version)

    def version_folder(self, version: int) -> Path:
        return version_folder(self._folder, version)

    def _forget_old(self, newest: int) -> None:
        """Also what is numbered above it, of a life of the run that went further than the checkpoint it came back from."""
        folders = sorted(self._folder.glob("version_*"))
        last = folders.index(self.version_folder(newest))
        for folder in (*folders[: max(0, last + 1 - KEPT)], *folders[last + 1 :]):
            shutil.rmtree(folder, ignore_errors=True)

    def proved(self, version: int, label: str, probe: Probe) -> None:
        write_proof(self.version_folder(version), label, probe)

    def close(self, fleet: Fleet | None) -> None:
        pass


def _read_again(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = fingerprint(file.get_tensor(name))
    return found
