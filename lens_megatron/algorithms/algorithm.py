"""An algorithm is four slots filled with values: which prompts (filter), which rollouts (rescue), advantage, loss."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from lens_megatron.algorithms.advantages import AdvantageConfig
from lens_megatron.algorithms.filters import FilterConfig
from lens_megatron.algorithms.greso import GresoConfig
from lens_megatron.algorithms.loss_config import EngineCorrectionConfig, LossConfig
from lens_megatron.algorithms.rescue import RescueConfig


@dataclass(frozen=True)
class AlgorithmConfig:
    """Combinations that mean nothing are refused here, each with its reason."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    filter: FilterConfig = field(default_factory=FilterConfig)
    rescue: RescueConfig = field(default_factory=RescueConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        _refuse_unused_values(self.filter, self.loss)
        if self.filter.skips_before_rollout and self.advantage.learns_from == "any":
            raise ValueError(
                f"filter.mode {self.filter.mode} skips prompts whose rewards are all equal, from which the baseline "
                f"{self.advantage.baseline} may learn: set filter.mode: none, or a std"
            )
        if self.rescue.mode == "none":
            _refuse_rescue_values(self.rescue, self.advantage, self.loss)
        else:
            _refuse_rescue_conflicts(self.rescue, self.loss)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference policy must score anything: responses for the KL, or prompts for Eq. 1."""
        return self.loss.any_kl or (self.rescue.mode != "none" and self.rescue.strategy == "interference")


def _refuse_unused_values(filtering: FilterConfig, loss: LossConfig) -> None:
    """Of a slot that is off: they would silently do nothing."""
    if filtering.mode in ("none", "greso") and filtering.size_factor != FilterConfig.size_factor:
        raise ValueError(
            f"filter.size_factor does nothing with filter.mode {filtering.mode}: set mode: dynamic, or it to its default "
            f"{FilterConfig.size_factor:g}"
        )
    if not filtering.skips_before_rollout and filtering.greso != GresoConfig():
        raise ValueError(f"filter.greso does nothing with filter.mode {filtering.mode}: set mode: greso")
    correction = loss.engine_correction
    if correction.mode == "none" and correction != EngineCorrectionConfig():
        raise ValueError("loss.engine_correction's cap and floor do nothing with mode none: set mode: truncate")


def _refuse_rescue_values(rescue: RescueConfig, advantage: AdvantageConfig, loss: LossConfig) -> None:
    """Without a rescue there is no purified rollout, and a value about them would silently do nothing."""
    standing = RescueConfig(success_threshold=rescue.success_threshold)  # the threshold is everybody's
    if given := [one.name for one in fields(RescueConfig) if getattr(rescue, one.name) != getattr(standing, one.name)]:
        raise ValueError(
            f"rescue.{given[0]} does nothing with rescue.mode none: set mode: purification, or {given[0]} to its default "
            f"{getattr(standing, given[0])}"
        )
    if loss.purified.kind != "literal":
        raise ValueError(
            f"loss.purified_ratio {loss.purified_ratio!r} is about purified rollouts, and rescue.mode none has none: "
            "set rescue.mode: purification, or leave it literal"
        )
    if loss.imitation_coef > 0:
        raise ValueError("loss.imitation_coef imitates purified rollouts, and rescue.mode none has none: set it to 0")
    if loss.kl_scope == "original":
        raise ValueError(
            "loss.kl_scope 'original' leaves out purified rollouts, and rescue.mode none has none: set all"
        )
    if advantage.weights in ("rescued_only", "purified_only"):
        raise ValueError(
            f"advantage.weights {advantage.weights!r} weighs rescued groups, and rescue.mode none has none: "
            "set all (grpo_weighted) or none"
        )


def _refuse_rescue_conflicts(rescue: RescueConfig, loss: LossConfig) -> None:
    kind = loss.purified.kind
    if loss.surrogate == "aspo" and kind in ("literal", "gspo"):
        raise ValueError(
            "loss.surrogate aspo turns the ratio of successes over, and that of purified ones (Eq. 5) is small where x makes "
            f"them improbable: with purified_ratio {kind} just these would weigh most. Set purified_ratio: none or floor(C)"
        )
    if rescue.strategy == "resample" and kind != "none":
        raise ValueError(
            f"rescue.strategy resample deletes nothing, so there is no x' for loss.purified_ratio {kind!r} to correct: "
            "set loss.purified_ratio: none"
        )
    if kind == "mixture" and rescue.replacement != "union":
        raise ValueError(
            "loss.purified_ratio mixture weighs draws from half x, half x': a group of chosen successes is not such a "
            "draw. Set rescue.replacement: union, which trains on all rollouts of both"
        )
    if rescue.replacement == "union" and loss.imitation_coef > 0:
        raise ValueError(
            "loss.imitation_coef imitates every purified rollout, and rescue.replacement union keeps failures among them: "
            "set it to 0, or replacement: all"
        )
    if rescue.replacement == "union" and kind != "mixture" and rescue.strategy != "resample":
        raise ValueError(
            "rescue.replacement union trains on failures under x' too, which only loss.purified_ratio mixture(token) "
            "or mixture(sequence) weighs: set it, or replacement: all"
        )
