"""A shuffled order of prompts that can be put down and taken up again, on any machine and Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from lens_megatron.errors import UsageError


def epoch_order(ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """By the hash of (seed, epoch, id): no library's shuffle, and a row added elsewhere moves no other row past
    another."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{ids[index]}".encode(), digest_size=16).digest()

    return sorted(range(len(ids)), key=key)


class PromptOrder:
    """Indices, batch by batch, epoch after epoch; no prompt twice in a batch.

    Shuffled, a batch never spans two epochs: what is left over when an epoch cannot fill it is skipped, other prompts each
    time. In the data's own order the same ones would be, each time: there the next epoch's first prompts complete it.
    """

    def __init__(self, ids: Sequence[str], seed: int, shuffle: bool = True) -> None:
        self._ids, self._seed, self._shuffle = list(ids), seed, shuffle
        self.epoch, self.position = 0, 0
        self._order = self._of_epoch(0)

    def take(self, count: int) -> list[int]:
        if count > len(self._ids):
            raise UsageError(f"{count} prompts a step from a data set of {len(self._ids)}: lower data.prompts_per_step")
        carried: list[int] = []
        if self.position + count > len(self._order):
            if not self._shuffle:
                carried = self._order[self.position :]
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._of_epoch(self.epoch)
        start, self.position = self.position, self.position + count - len(carried)
        return carried + self._order[start : self.position]

    def checksum(self) -> str:
        """Of the ids in this epoch's order."""
        digest = hashlib.blake2b(digest_size=16)
        for index in self._order:
            digest.update(self._ids[index].encode() + b"\0")
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "seed": self._seed, "checksum": self.checksum()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["seed"] != self._seed:
            raise UsageError(f"the checkpoint's data order has seed {state['seed']}, this run has seed {self._seed}")
        order = self._of_epoch(state["epoch"])
        previous = self.epoch, self._order
        self.epoch, self._order = state["epoch"], order
        if self.checksum() != state["checksum"]:
            self.epoch, self._order = previous
            raise UsageError(
                "the prompts are not those of the checkpoint: data.train, its limits or its template changed"
            )
        self.position = state["position"]

    def _of_epoch(self, epoch: int) -> list[int]:
        return epoch_order(self._ids, self._seed, epoch) if self._shuffle else list(range(len(self._ids)))
