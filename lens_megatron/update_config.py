"""`update:` and `diagnostics:` of RUN.yaml, apart from the code that does them, which imports Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class UpdateConfig:
    """`update:` of RUN.yaml."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    minibatches: int = 1  # updates a batch of groups is split into
    epochs: int = 1  # passes over the batch
    tokens_per_microbatch: int = 16384  # over all context-parallel ranks
    # megatron: pi_old scored by the trainer.  engine: the engine's own log-probs stand for it
    old_logprobs: Literal["megatron", "engine"] = "megatron"
    # pi_old is read off the training pass itself where it is provably pi_theta, detached: see `current_is_proximal`
    reuse_logprobs: bool = True

    def __post_init__(self) -> None:
        for name in ("minibatches", "epochs", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)})")


@dataclass(frozen=True)
class DiagnosticsConfig:
    """`diagnostics:`. Each time costs three backward and two forward passes over the batch."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    every: int = 0  # steps; 0: never

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every is 0 or more (got {self.every})")

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0
