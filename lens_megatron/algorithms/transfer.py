"""Does what was learnt under x' show under x? The decisive question about a rescue, answered when a prompt comes back.

A prompt with a < tau is remembered, rescued or not. At least `lag` steps later its next group of original rollouts
tells how it fares now, and rescued prompts are compared with those of the same a that were not rescued.

The comparison is matched by a and by nothing else. Prompts that purification could not help may be harder at equal a,
which flatters the rescue; a run with strategy `resample` has the same flaw, so compare with its difference. Data gone
through once never comes back: then evaluate a fixed set of prompts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lens_megatron.algorithms.rescue import RebuiltGroup


class TransferTracker:
    """One entry a waiting prompt, and four sums for each value of a. Its state belongs in the checkpoint."""

    def __init__(self, lag: int = 20) -> None:
        if lag < 1:
            raise ValueError(f"lag is 1 step or more: got {lag}")
        self.lag = lag
        self._waiting: dict[str, tuple[int, str, bool]] = {}  # prompt -> step, a as text, rescued
        # a -> [rescued prompts, sum of their success rates now, others, sum of theirs]
        self._strata: dict[str, list[float]] = {}

    def update(self, step: int, groups: Sequence[RebuiltGroup]) -> dict[str, float]:
        """Takes in one step's groups; metrics over the run so far, those without a prompt yet left out."""
        for group in groups:
            prompt_id = group.group.prompt.id
            then = self._waiting.get(prompt_id)
            if then is not None and step - then[0] >= self.lag:
                sums = self._strata.setdefault(then[1], [0.0, 0.0, 0.0, 0.0])
                first = 0 if then[2] else 2
                sums[first] += 1
                sums[first + 1] += group.success_rate
                del self._waiting[prompt_id]
            # the first time counts: who is written down anew at every failure is asked only after doing well throughout
            if group.why not in ("off", "enough_success") and prompt_id not in self._waiting:
                self._waiting[prompt_id] = (step, repr(group.success_rate), group.rescued)
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        strata = self._strata.values()
        rescued = sum((sums[0] for sums in strata), 0.0)
        others = sum((sums[2] for sums in strata), 0.0)
        metrics = {"transfer/rescued_prompts": rescued, "transfer/other_prompts": others}
        if rescued:
            gains = sum(sums[1] - sums[0] * float(a) for a, sums in self._strata.items())
            metrics["transfer/rescued_gain"] = gains / rescued
        matched = [sums for sums in strata if sums[0] and sums[2]]
        if matched:
            weight = sum(sums[0] for sums in matched)
            difference = sum(sums[0] * (sums[1] / sums[0] - sums[3] / sums[2]) for sums in matched)
            metrics["transfer/matched_difference"] = difference / weight
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "waiting": {prompt_id: list(then) for prompt_id, then in self._waiting.items()},
            "strata": {a: list(sums) for a, sums in self._strata.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting = {
            prompt_id: (int(step), str(a), bool(rescued)) for prompt_id, (step, a, rescued) in state["waiting"].items()
        }
        self._strata = {a: [float(value) for value in sums] for a, sums in state["strata"].items()}
