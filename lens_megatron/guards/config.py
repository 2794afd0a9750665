"""`guards:` of RUN.yaml. All on by default; bounds that are null follow the precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

# Largest mean |difference| of log-probs that rounding explains (docs/trust.md has the measurements).
_WITHIN_TRAINER = {"fp32": 1e-3, "bf16": 0.05}
_TO_ENGINE = {"fp32": 0.01, "bf16": 0.1}
# bf16 keeps 8 bits: of unlikely tokens, whose log-probs are large, rounding explains more
_OF_LOGPROB = {"fp32": 0.0, "bf16": 0.01}


@dataclass(frozen=True)
class ModelGuardConfig:
    """Of whatever trains a model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    hf_parity: bool = True  # after loading: the sharded model against a layer-by-layer computation from the HF files
    export_parity: bool = True  # after loading: what would be exported against the HF files
    probe_tokens: int = 128  # of hf_parity
    # mean |difference| within the trainer; null: 0.001 in fp32, 0.05 in bf16, for the probe of hf_parity at least 1% of its
    # mean |log-prob|
    logprob_tolerance: float | None = None
    replicas_every: int = 10  # steps between comparisons of weights that several ranks hold; 0: never
    skipped_in_row: int = 3  # steps without a finite loss and gradient before the run stops; 0: never

    def __post_init__(self) -> None:
        _above_zero("logprob_tolerance", self.logprob_tolerance)
        for name in ("replicas_every", "skipped_in_row"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more (got {getattr(self, name)})")
        if self.probe_tokens < 2:
            raise ValueError(f"probe_tokens is at least 2: the first token has no log-prob (got {self.probe_tokens})")

    def within_trainer(self, precision: str) -> float:
        return self.logprob_tolerance or _WITHIN_TRAINER[precision]

    def for_probe(self, precision: str, size: float) -> float:
        """`size`: the mean |log-prob| of the probe's tokens, which are drawn at random and unlikely."""
        share = _OF_LOGPROB[precision] * size if math.isfinite(size) else 0.0
        return self.logprob_tolerance or max(_WITHIN_TRAINER[precision], share)


@dataclass(frozen=True)
class GuardConfig(ModelGuardConfig):
    first_step: bool = True  # policy and reference of the same weights say the same before the first update
    engine_weights: bool = True  # after each sync: checksums of the embedded engine's weights against what was sent
    resume_parity: bool = True  # optimizer and weights after loading against what was saved
    entropy_masks: bool = True  # tokens masked as of high entropy have it
    logprob_diff: float | None = None  # mean |trainer - engine|; null: 0.01 in fp32, 0.1 in bf16
    # over logprob_diff: stop. drop_sequences: those over it get no policy gradient. mask_tokens: tokens over token_diff
    # get none. report: nothing but the metrics
    on_logprob_diff: Literal["stop", "drop_sequences", "mask_tokens", "report"] = "stop"
    token_diff: float = 2.0  # |trainer - engine| of one token
    most_left_out: float = 0.5  # share of tokens that may be masked or dropped before the run stops
    reward_failures: float = 0.2  # share of a step's judgements that timed out or died before the run stops

    def __post_init__(self) -> None:
        super().__post_init__()
        _above_zero("logprob_diff", self.logprob_diff)
        for name in ("most_left_out", "reward_failures"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share above 0, up to 1 (got {getattr(self, name)})")
        if self.token_diff <= 0:
            raise ValueError(f"token_diff is above 0 (got {self.token_diff})")

    def to_engine(self, precision: str) -> float:
        return self.logprob_diff or _TO_ENGINE[precision]

    @property
    def leaves_out(self) -> bool:
        return self.on_logprob_diff in ("mask_tokens", "drop_sequences")


def _above_zero(name: str, bound: float | None) -> None:
    if bound is not None and bound <= 0:
        raise ValueError(f"{name} is above 0, or null (got {bound})")
