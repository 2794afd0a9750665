"""What a run needs of the storage that its nodes share."""

from __future__ import annotations

from dataclasses import dataclass

from lens_megatron.config import RunConfig
from lens_megatron.model_spec import ModelSpec
from lens_megatron.planning.parameters import count_parameters

_OPTIMIZER_BYTES = 12  # a parameter: its fp32 weight and Adam's two moments
_SYNCED_VERSIONS = 3  # two are kept, and one is being written


@dataclass(frozen=True)
class Stored:
    name: str
    each: int  # bytes
    most: int  # how many there are at once, the one that is being written included

    @property
    def bytes(self) -> int:
        return self.each * self.most


def stored_by_run(config: RunConfig, spec: ModelSpec, files: bool) -> list[Stored]:
    """As on GPUs, where `precision: auto` is bf16. Rollouts and metrics are small beside it. `files`: new weights reach the
    engine through them."""
    settings, parameters = config.checkpoint, count_parameters(spec)
    weights = (4 if config.precision == "fp32" else 2) * parameters
    kept = settings.keep + (settings.keep_best is not None)
    # a job that ends before the run writes one that is not due
    stored = [Stored("checkpoints", weights + _OPTIMIZER_BYTES * parameters, min(kept + 1, config.steps))]
    if settings.hf_every:
        copied = -(-config.steps // settings.hf_every)  # also after the last step
        most = copied if settings.hf_keep is None else min(settings.hf_keep + 1, copied)
        stored.append(Stored("HF copies", weights, most))
    if files:
        stored.append(Stored("engine weights", weights, min(_SYNCED_VERSIONS, config.steps + 1)))
    return stored
