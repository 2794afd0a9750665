"""What the rollout side asks of an engine; the embedded model, SGLang and the simulation of benchmarks/ all answer to it.

An engine is driven by one thread. Requests go in with `submit`, finished responses come out of `poll`, in any order.
Admission is the caller's: it submits no more than `free_slots()` when it wants nothing to wait inside the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from lens_megatron.routed_experts import Routing
    from lens_megatron.types import FinishReason


@dataclass(frozen=True)
class Request:
    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[int, ...] = ()  # token ids that end a response; the one that ended it is part of the response
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0
    priority: int = 0  # smaller enters first
    routing: bool = False  # also which experts every token went to

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id}: empty prompt")
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"request {self.id}: max_tokens >= 1, temperature >= 0 and 0 < top_p <= 1 are needed")


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, end) were sampled with the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Finished:
    """A response. `finish == "abort"`: only the part sampled before the abort, or nothing where its versions are unknown."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # log_softmax(logits / temperature) over the whole vocabulary, also when top_p < 1
    finish: FinishReason
    versions: tuple[VersionSpan, ...] = ()
    routing: Routing | None = None  # of prompt and response but the last token, where the request asked for it

    @property
    def oldest_version(self) -> int:
        return min((span.version for span in self.versions), default=0)

    def completed(self, stop: Sequence[int], max_tokens: int) -> Finished:
        """Itself, unless an abort came after the last token: that one aborted nothing."""
        if self.finish != "abort" or not self.tokens:
            return self
        if self.tokens[-1] in stop:
            return replace(self, finish="stop")
        return replace(self, finish="length") if len(self.tokens) == max_tokens else self

    def followed_by(self, rest: Finished) -> Finished:
        """One response from the part before an abort and what was sampled after it. Each token keeps the log-prob and the
        version that it was sampled with; the routing is that of the second pass, which read all of it again."""
        begin = len(self.tokens)
        moved = tuple(VersionSpan(span.version, begin + span.start, begin + span.end) for span in rest.versions)
        return Finished(
            rest.id,
            self.tokens + rest.tokens,
            self.logprobs + rest.logprobs,
            rest.finish,
            self.versions + moved,
            rest.routing,
        )


@dataclass(frozen=True)
class Health:
    ok: bool
    running: int
    waiting: int
    version: int
    progress: int = 0  # grows whenever a token is sampled: tells slow from stuck
    detail: str = ""


class Engine(Protocol):
    @property
    def version(self) -> int:
        """The weights' version, -1 while they are only partly loaded."""

    @property
    def deterministic(self) -> bool:
        """Whether the same calls give the same responses in the same order, by the requests' seeds (the sampler then waits
        for rewards between polls, so that what it submits next does not depend on how fast they were computed)."""

    @property
    def positions(self) -> int | None:
        """Tokens of prompt and response together that a request may ask for; None: without limit."""

    def submit(self, requests: Sequence[Request]) -> None: ...

    def poll(self, timeout: float) -> list[Finished]:
        """What finished since the last poll; waits for the first up to `timeout` seconds."""

    def abort(self, ids: Iterable[str]) -> None:
        """Their partial responses come out of `poll` with finish "abort"; unknown or finished ids are ignored."""

    def free_slots(self) -> int:
        """How many more requests would start at once."""

    def begin_update(self, version: int) -> None: ...

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Some weights, by their Hugging Face names."""

    def end_update(self) -> None:
        """Checks that every weight came, drops every cached key and value, and takes the new version. Responses in
        flight go on with the new weights."""

    def clock(self) -> float:
        """Seconds, of the wall or of the simulation."""

    def health(self) -> Health: ...

    def close(self) -> None: ...


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything that prints the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
