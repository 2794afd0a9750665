"""What was sent of one version of the weights: names, bytes, fingerprints, and who acknowledged.

A probe's log-probs cannot show a stale tensor in bf16 after one update at lr 1e-6: it moves them less than the engine's
own noise. The ledger compares bytes. Each tensor has two fingerprints: of the tensor as it left the model, and of the
same bytes read back from the transport's buffer (or file) after the servers had acknowledged them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

_MOST_NAMES = 4  # in one message


@dataclass(frozen=True)
class Entry:
    """One tensor of one version."""

    name: str
    bucket: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    exported: str  # fingerprint as it left the model
    sent: str = ""  # fingerprint of what was on its way, after it was acknowledged


@dataclass
class Ledger:
    """`expected`: every name of the model with its shape. `acknowledged`: server -> numbers of the buckets it took."""

    version: int
    transport: str
    expected: Mapping[str, tuple[int, ...]]
    entries: dict[str, Entry] = field(default_factory=dict)
    acknowledged: dict[str, list[int]] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.name in self.entries:
                raise AssertionError(f"weight sync: {entry.name} was sent twice")
            self.entries[entry.name] = entry

    def sent(self, fingerprints: Mapping[str, str]) -> None:
        for name, value in fingerprints.items():
            self.entries[name] = replace(self.entries[name], sent=value)

    def acknowledge(self, server: str, bucket: int) -> None:
        self.acknowledged.setdefault(server, []).append(bucket)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    @property
    def digest(self) -> str:
        """Of all weights of the version, by what left the model: equal weights have equal digests."""
        text = "".join(f"{name}:{self.entries[name].exported};" for name in sorted(self.entries))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def problems(self, servers: Sequence[str] = ()) -> list[str]:
        """What keeps this version from being whole at these servers; empty when it is."""
        found = []
        if missing := sorted(self.expected.keys() - self.entries.keys()):
            found.append(f"{len(missing)} of {len(self.expected)} weights were never sent: {some(missing)}")
        if unknown := sorted(self.entries.keys() - self.expected.keys()):
            found.append(f"weights that the model does not have were sent: {some(unknown)}")
        wrong = [e.name for e in self.entries.values() if e.shape != self.expected.get(e.name, e.shape)]
        if wrong:
            found.append(f"weights of another shape than the model's were sent: {some(wrong)}")
        if stale := [e.name for e in self.entries.values() if e.sent and e.sent != e.exported]:
            found.append(f"what was sent is not what left the model: {some(stale)}")
        if unread := [e.name for e in self.entries.values() if not e.sent]:
            found.append(f"weights that were prepared but never sent: {some(unread)}")
        buckets = sorted({entry.bucket for entry in self.entries.values()})
        for server in servers:
            taken = sorted(self.acknowledged.get(server, []))
            if taken != buckets:
                lost = sorted(set(buckets) - set(taken))
                what = f"did not take buckets {lost}" if lost else f"took buckets {taken} for {buckets}"
                found.append(f"{server} {what}")
        return found

    def tree(self) -> dict[str, Any]:
        """As it is written to the run folder."""
        return {
            "version": self.version,
            "transport": self.transport,
            "digest": self.digest,
            "bytes": self.bytes,
            "tensors": [asdict(entry) for entry in self.entries.values()],
            "acknowledged": self.acknowledged,
        }


def some(names: Sequence[str]) -> str:
    """A few of them, and how many more."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
