"""What purification goes by, in training: log-probs of the batch's prompts under policy and reference, or gradient norms.

Shapes: T tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lens_megatron.algorithms.rescue import RescueConfig
from lens_megatron.mcore import runtime
from lens_megatron.mcore.noise import evaluations_in_other_packings
from lens_megatron.mcore.offload import FrozenOnHost
from lens_megatron.mcore.step import ShardedModel, Trainable
from lens_megatron.purification.config import PurificationConfig
from lens_megatron.purification.noise_floor import measured_noise_floor
from lens_megatron.purification.scores import interference_scores
from lens_megatron.purification.strategies import Signals
from lens_megatron.reference_scores import ReferenceScores
from lens_megatron.types import Prompt

# how many prompts the noise floor is measured on: every token counts, so a few prompts give thousands
_NOISE_PROMPTS = 16


class Reference:
    """The frozen model, and what it said of prompts. `offloaded`: it lives on the host between its uses."""

    def __init__(self, model: ShardedModel, identity: str, offloaded: bool) -> None:
        self.model, self.scores = model, ReferenceScores(identity)
        self._on_host = FrozenOnHost(model) if offloaded else None

    @contextmanager
    def at_hand(self) -> Iterator[ShardedModel]:
        """The model where it can score."""
        if self._on_host is not None:
            self._on_host.arrive(runtime.device())
        try:
            yield self.model
        finally:
            if self._on_host is not None:
                self._on_host.leave()

    def prompt_logprobs(self, prompts: Sequence[Prompt], budget: int) -> list[Tensor]:
        """logprobs_T of each prompt; only those not seen before are computed."""

        def computed(unseen: Sequence[Prompt]) -> list[Tensor]:
            with self.at_hand() as model:
                return model.score(_tokens(unseen), budget, entropy=False).logprobs

        return self.scores.of(prompts, computed)


class PromptSignals:
    """`budget`: tokens in a pack of the forward pass."""

    def __init__(self, policy: Trainable, reference: Reference | None, rescue: RescueConfig, budget: int) -> None:
        self._policy, self._reference, self._rescue, self._budget = policy, reference, rescue, budget
        self.noise_floor: float | None = None  # measured at first use

    @property
    def needs_models(self) -> bool:
        return self._rescue.mode != "none" and self._rescue.strategy in ("interference", "gradient")

    def of(
        self, prompts: Sequence[Prompt], watch: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None
    ) -> list[Signals]:
        """`watch` is shown the prompts' log-probs under policy and reference."""
        if not self.needs_models:
            return [Signals()] * len(prompts)
        sequences = _tokens(prompts)
        if self._rescue.strategy == "gradient":
            from lens_megatron.mcore.embedding_gradients import embedding_gradient_norms

            norms = embedding_gradient_norms(self._policy, sequences, self._budget)
            return [Signals(gradient_norms_T=norms_T) for norms_T in norms]
        assert self._reference is not None
        if self.noise_floor is None and self._rescue.noise_floor == "measured":
            self.noise_floor = floor_of(self._policy, sequences, self._rescue, self._budget)
        policy = self._policy.score(sequences, self._budget, entropy=False).logprobs
        reference = self._reference.prompt_logprobs(prompts, self._budget)
        if watch is not None:
            watch(policy, reference)
        return [
            Signals(scores_T=interference_scores(policy_T, reference_T), measured_floor=self.noise_floor)
            for policy_T, reference_T in zip(policy, reference, strict=True)
        ]


def floor_of(model: ShardedModel, sequences: Sequence[Tensor], purification: PurificationConfig, budget: int) -> float:
    evaluations = evaluations_in_other_packings(model, sequences[:_NOISE_PROMPTS], budget)
    return measured_noise_floor(evaluations, purification.noise_quantile)


def _tokens(prompts: Sequence[Prompt]) -> list[Tensor]:
    return [torch.tensor(prompt.tokens) for prompt in prompts]
