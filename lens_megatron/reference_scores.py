"""The reference's log-probs of prompts, kept for later epochs: a frozen model says the same of the same prompt.

Kept under the identity of the weights, dtype and layout that computed them; whoever resumes under another identity starts
empty. Every rank holds the same entries, because every rank is told the same scores in the same order.

Shapes: T tokens of one prompt.
"""

from __future__ import annotations

import base64
import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_megatron.types import Prompt

MOST_TOKENS = 20_000_000  # 80 MB in memory of every rank and in every checkpoint; prompts past it are scored each time


class ReferenceScores:
    def __init__(self, identity: str, most_tokens: int = MOST_TOKENS) -> None:
        self._identity, self._room = identity, most_tokens
        self._logprobs: dict[str, Tensor] = {}
        self.asked = self.known = 0  # prompts, since `counted`

    def of(self, prompts: Sequence[Prompt], score: Callable[[Sequence[Prompt]], Sequence[Tensor]]) -> list[Tensor]:
        """logprobs_T of every prompt; `score` is called for those not seen before, if there are any."""
        keys = [_key(prompt.tokens) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._logprobs}
        self.asked += len(prompts)
        self.known += sum(key not in missing for key in keys)
        fresh = dict(zip(missing, score(list(missing.values())), strict=True)) if missing else {}
        for key, logprobs_T in fresh.items():
            if len(logprobs_T) <= self._room:
                self._logprobs[key] = logprobs_T.float().clone()  # not a view of the whole batch's
                self._room -= len(logprobs_T)
        return [fresh[key] if key in fresh else self._logprobs[key] for key in keys]

    def counted(self) -> float | None:
        """The share of prompts known already, since this was asked last."""
        share = self.known / self.asked if self.asked else None
        self.asked = self.known = 0
        return share

    def state_dict(self) -> dict[str, Any]:
        """As JSON: floats by their bits."""
        encoded = {key: base64.b64encode(part_T.numpy().tobytes()).decode() for key, part_T in self._logprobs.items()}
        return {"identity": self._identity, "logprobs": encoded}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """False: computed by other weights, or in another dtype or layout; nothing is taken."""
        if state["identity"] != self._identity:
            return False
        for key, text in state["logprobs"].items():
            self._logprobs[key] = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
            self._room -= len(self._logprobs[key])
        return True


def identity_of(weights: Path, *computed_by: object) -> str:
    """Of a reference: its files (names, sizes, times, and each shard's header), and whatever else changes its bits."""
    digest = hashlib.blake2b(repr(computed_by).encode(), digest_size=16)
    for path in sorted(weights.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little")))
    return digest.hexdigest()


def _key(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).hexdigest()
