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

import torch
from torch import Tensor

_WIDTH = 4096  # words a row of the fingerprint's matrix
_CACHED_ROWS = 16
_MOST_NAMES = 4  # in one message
_WORDS: dict[tuple[str, int], Tensor] = {}


def fingerprint(tensor: Tensor) -> str:
    """16 hex digits of a tensor's bytes, on its own device, at the speed of one read (two on a GPU).

    The bytes are a matrix of 64-bit words; its column sums are weighed with fixed odd numbers and its row sums with
    fixed even ones, modulo 2^64. A word so counts an odd number of times, and one changed word always shows: an even
    number would lose its highest bits. Not cryptographic: it guards against faults, not against people.
    """
    bytes_B = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = bytes_B.numel() // (8 * _WIDTH) * (8 * _WIDTH)
    total = bytes_B.numel()
    for rows_RW in (bytes_B[:whole].view(torch.int64).view(-1, _WIDTH), _padded(bytes_B[whole:])):
        if rows_RW.numel():
            columns_W, rows_R = _sums(rows_RW)
            weighed_W, weighed_R = columns_W * odd_words(columns_W, 1), rows_R * (odd_words(rows_R, 2) << 1)
            total = total * 31 + int(weighed_W.sum() + weighed_R.sum())
    return f"{total % 2**64:016x}"


def _sums(rows_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Over rows and over columns; on a CPU block by block, so that the second sum reads its cache."""
    if rows_RW.device.type != "cpu":
        return rows_RW.sum(0), rows_RW.sum(1)
    columns_W = rows_RW.new_zeros(rows_RW.shape[1])
    rows = []
    for block_RW in rows_RW.split(_CACHED_ROWS):
        columns_W += block_RW.sum(0)
        rows.append(block_RW.sum(1))
    return columns_W, torch.cat(rows)


def _padded(bytes_B: Tensor) -> Tensor:
    """As rows of words, the last filled with zeros."""
    filled_B = bytes_B.new_zeros(-(-bytes_B.numel() // (8 * _WIDTH)) * 8 * _WIDTH)
    filled_B[: bytes_B.numel()] = bytes_B
    return filled_B.view(torch.int64).view(-1, _WIDTH)


def odd_words(like: Tensor, seed: int, start: int = 0) -> Tensor:
    """Fixed odd numbers from number `start` on, as many as `like` has elements; the same in every process."""
    key, stop = (str(like.device), seed), start + like.numel()
    have = _WORDS.get(key)
    if have is None or have.numel() < stop:
        count = max(_WIDTH, 2 * stop)
        words = torch.arange(1, count + 1, dtype=torch.int64) * (0x9E3779B97F4A7C15 - 2**64) + seed
        words = (words ^ (words >> 31)) * (0xBF58476D1CE4E5B9 - 2**64)
        words = (words ^ (words >> 29)) * 0x14D049BB133111EB
        have = _WORDS[key] = (words | 1).to(like.device)
    return have[start:stop]


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
