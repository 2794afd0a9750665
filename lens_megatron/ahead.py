"""The next step's first batch, generated while this step trains (`rollout.staleness: 1`), and its place in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lens_megatron import strict
from lens_megatron.errors import UsageError
from lens_megatron.purification.scores import from_optional, to_optional
from lens_megatron.purification.strategies import Signals
from lens_megatron.rollout.sampling import SampleResult
from lens_megatron.types import Prompt


@dataclass
class Ahead:
    """`stream_before`: the data's order before these prompts were drawn: a resumed run draws the same ones again."""

    step: int
    prompts: list[Prompt]
    stream_before: dict[str, Any]
    signals: Sequence[Signals] = ()
    result: SampleResult | None = None  # None: under way

    def tree(self) -> dict[str, Any] | None:
        """JSON-ready, once the rollouts are done. None where they carry experts, half a kilobyte a token of a large mixture:
        a resumed run draws the same prompts and rolls them out again."""
        assert self.result is not None
        if any(r.routing is not None for group in self.result.groups for r in (*group.originals, *group.purified)):
            return None
        return {
            "step": self.step,
            "prompts": [prompt.id for prompt in self.prompts],
            "signals": [
                {
                    "scores": _listed(signal.scores_T),
                    "gradient_norms": _listed(signal.gradient_norms_T),
                    "measured_floor": signal.measured_floor,
                }
                for signal in self.signals
            ],
            "result": strict.to_tree(SampleResult, self.result),
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Signals and rollouts of the same prompts, from `tree`."""
        if tree["prompts"] != [prompt.id for prompt in self.prompts]:
            raise UsageError("the checkpoint's batch in flight is of other prompts than the data gives now")
        self.signals = [
            Signals(_tensor(signal["scores"]), _tensor(signal["gradient_norms"]), signal["measured_floor"])
            for signal in tree["signals"]
        ]
        self.result = strict.build(SampleResult, tree["result"], "the checkpoint's batch in flight")


def _listed(values_T: Tensor | None) -> list[float | None] | None:
    return None if values_T is None else to_optional(values_T)


def _tensor(values: Sequence[float | None] | None) -> Tensor | None:
    return None if values is None else from_optional(values)
