"""The loss slot's values, and which log-probabilities they ask the trainer to compute."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from lens_megatron.algorithms.surrogates import SURROGATES, TOKEN_ONLY
from lens_megatron.own_functions import named

RatioLevel = Literal["token", "sequence", "length_normalised"]
PurifiedRatioKind = Literal["literal", "floor", "none", "luffy", "gspo", "power", "mixture"]


class PurifiedRatio(NamedTuple):
    """`loss.purified_ratio` taken apart: what stands in for Eq. 5's ratio on purified rollouts."""

    kind: PurifiedRatioKind
    value: float = 0.0  # floor's c, power's alpha, luffy's gamma
    level: Literal["token", "sequence"] = "token"  # of the mixture's denominator


def parse_purified_ratio(text: str) -> PurifiedRatio:
    """literal, none, gspo, luffy, luffy(G), floor(C), power(A), mixture(token) or mixture(sequence)."""
    match = re.fullmatch(r"(\w+)(?:\(\s*([\w.+-]+)\s*\))?", text.strip())
    name, argument = match.groups() if match else (text, None)
    if name in ("literal", "none", "gspo") and argument is None:
        return PurifiedRatio(name)  # type: ignore[arg-type]
    if name == "mixture" and argument in ("token", "sequence"):
        return PurifiedRatio("mixture", level=argument)  # type: ignore[arg-type]
    if name in ("floor", "power", "luffy"):
        value = _number("0.1" if argument is None and name == "luffy" else argument)
        if value is not None and value > 0 and (value <= 1 or name == "luffy"):
            return PurifiedRatio(name, value)  # type: ignore[arg-type]
    raise ValueError(
        f"purified_ratio {text!r}: write literal, none, gspo, luffy, floor(C) or power(A) with a number in (0, 1], "
        "mixture(token) or mixture(sequence)"
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


@dataclass(frozen=True)
class EntropySplitConfig:
    """Tokens in two kinds by the current model's entropy under x (80/20 and Archer).

    batch: the ceil(high_share x N) tokens of highest entropy among all N response tokens of the mini-batch.
    response: in each response, the tokens above its own (1 - high_share) quantile.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    scope: Literal["batch", "response"] = "batch"
    high_share: float = 0.2
    train_on: Literal["all", "high", "low"] = "all"  # the tokens that carry the policy gradient
    denominator: Literal["selected", "full"] = "selected"  # of their mean; at 20% selected the two differ by a factor 5
    # high-entropy tokens' own values; null: the loss's. When set, the loss's values hold for low-entropy tokens.
    high_clip_low: float | None = None
    high_clip_high: float | None = None
    high_kl_coef: float | None = None  # when set, each of the two KLs is averaged over its own tokens

    def __post_init__(self) -> None:
        if not 0 < self.high_share < 1:
            raise ValueError("entropy_split.high_share must be between 0 and 1")
        for name in ("high_clip_low", "high_clip_high", "high_kl_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"entropy_split.{name} must not be negative")


@dataclass(frozen=True)
class EngineCorrectionConfig:
    """Importance weights pi_proximal / pi_behaviour for the mismatch of trainer and engine, apart from PPO's ratio.

    truncate: min(weight, cap). mask_tokens: as truncate, and tokens whose weight is outside [floor, cap] are dropped.
    mask_sequences: as truncate, and sequences whose geometric mean weight is outside [floor, cap] are dropped.
    Dropped tokens stay in the denominators.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    mode: Literal["none", "truncate", "mask_tokens", "mask_sequences"] = "none"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1 <= self.cap:
            raise ValueError("engine_correction needs 0 <= floor < 1 <= cap: a weight of 1 means no mismatch")


@dataclass(frozen=True)
class LossConfig:
    """One point in the family: PPO's clipped surrogate and its rivals, KL, token masks, corrections."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    surrogate: str = "clip"  # a name in surrogates.SURROGATES: clip, cispo, aspo; or module:function
    ratio: RatioLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # bound on the ratio of negative advantages (aspo: and on the inverted one)
    # denominators are counted once over the global mini-batch. sum: Eq. 7's plain sum over a group, mean over groups
    aggregation: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: float = 0.001
    kl_scope: Literal["all", "original"] = "all"  # original: not on purified rollouts, where the estimate is biased
    entropy_coef: float = 0.0
    entropy_split: EntropySplitConfig | None = None
    purified_ratio: str = "literal"
    imitation_coef: float = 0.0  # - coef x mean_t log pi_theta(y_t | x) over the purified rollouts
    engine_correction: EngineCorrectionConfig = EngineCorrectionConfig()

    def __post_init__(self) -> None:
        try:
            named(self.surrogate, SURROGATES)
        except ValueError as error:
            raise ValueError(f"loss.surrogate {error}") from None
        for name in ("clip_low", "clip_high", "kl_coef", "imitation_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} must not be negative")
        if self.clip_low > 1:
            raise ValueError(
                "loss.clip_low above 1 clips nothing, a ratio is never negative: write 1.0 for no lower bound"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError("loss.dual_clip must be above 1")
        parse_purified_ratio(self.purified_ratio)
        self._refuse_meaningless()

    def _refuse_meaningless(self) -> None:
        if self.ratio != "token" and self.surrogate in TOKEN_ONLY:
            raise ValueError(
                f"loss.surrogate {self.surrogate!r} weighs each token by its own ratio: it needs ratio: token"
            )
        if self.surrogate == "aspo" and self.dual_clip is None:
            raise ValueError(
                "loss.surrogate aspo turns the ratio over, which nothing bounds: set loss.dual_clip (Archer 2: 3.0)"
            )
        if self.surrogate == "cispo" and self.dual_clip is not None:
            raise ValueError("loss.dual_clip has nothing to bound with cispo, whose weight is clipped already")
        if self.ratio == "sequence" and self.purified.kind in ("floor", "power", "luffy", "gspo"):
            raise ValueError(
                f"loss.purified_ratio {self.purified_ratio!r} weighs tokens, or their mean: beside ratio: sequence, whose "
                "gradient is the sum over a rollout's tokens, purified rollouts of L tokens would get 1 / L of theirs. "
                "Set ratio: token or length_normalised"
            )
        if self.kl == "k1" and self.any_kl:
            raise ValueError(
                "loss.kl k1 has a gradient of mean 0, noise and no pull towards the reference: set k3 or k2, or kl_coef: 0"
            )
        split = self.entropy_split
        if split and self.ratio != "token" and (split.high_clip_low is not None or split.high_clip_high is not None):
            raise ValueError(
                "entropy_split's own clips are per token: a sequence ratio is one number for all its tokens"
            )
        if split and split.train_on == "all" and split.denominator == "full":
            raise ValueError("entropy_split.denominator 'full' says nothing when train_on is all: leave it out")

    @property
    def purified(self) -> PurifiedRatio:
        return parse_purified_ratio(self.purified_ratio)

    @property
    def any_kl(self) -> bool:
        return self.kl_coef > 0 or bool(self.entropy_split and self.entropy_split.high_kl_coef)


def required_inputs(config: LossConfig) -> frozenset[str]:
    """Names of the optional LossInputs fields that this loss reads and the trainer must therefore fill."""
    needed = set()
    if config.any_kl:
        needed.add("reference_logprobs_T")
    if config.engine_correction.mode != "none":
        needed.add("behaviour_logprobs_T")
    if config.purified.kind in ("none", "mixture"):
        needed.add("proximal_original_logprobs_T")
    if config.purified.kind == "mixture":
        needed.add("proximal_purified_logprobs_T")
    if config.entropy_split is not None:
        needed.add("high_entropy_T")
    return frozenset(needed)
