"""The filter slot: which prompts are rolled out, and which groups train.

One interface for all modes:

    prompts.begin_step(step, epoch)
    while (size := prompts.next_batch_size()) is not None:
        chosen = []
        while len(chosen) < size:
            candidates = data.draw(size - len(chosen))
            wanted = prompts.propose([prompt.id for prompt in candidates])
            chosen += [prompt for prompt, roll_out in zip(candidates, wanted) if roll_out]
        prompts.accept([rebuild_group(group, ...) for group in sampler.roll_out(chosen)])
    groups = prompts.finish()

none            one batch, all of it trains.
dynamic         DAPO's dynamic sampling: batches of size_factor x the prompts per step, groups without a signal
                dropped, until enough are kept; the surplus is cut.
greso           GRESO: skips before the rollout, drops groups without a signal after it, sizes later batches by need,
                and trains short if the last one brings too few.
greso_dynamic   GRESO's skipping with dynamic sampling's full batches.

A signal is RebuiltGroup.has_signal (variance, for the shipped baselines but `original`): it is judged after the rescue, and on
the verifier's rewards, before any length penalty.
A batch is judged whole and groups stand in the order their prompts were drawn: whatever is cut is not the slowest.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

from lens_megatron.algorithms.greso import GresoConfig, GresoHistory, adaptive_batch, largest_batch
from lens_megatron.algorithms.rescue import RebuiltGroup
from lens_megatron.purification.seeds import seed_for, uniform


@dataclass(frozen=True)
class FilterConfig:
    """How prompts are chosen.

    size_factor  dynamic sampling rolls out this many times the prompts per step (DAPO: 1536 for 512).
    max_batches  after so many batches without enough groups, the step is an error.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    mode: Literal["none", "dynamic", "greso", "greso_dynamic"] = "none"
    size_factor: float = 3.0
    max_batches: int = 10
    greso: GresoConfig = field(default_factory=GresoConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.size_factor < float("inf"):
            raise ValueError(f"size_factor is 1 or more: got {self.size_factor}")
        if self.max_batches < 1:
            raise ValueError(f"max_batches is 1 or more: got {self.max_batches}")

    @property
    def drops_zero_signal(self) -> bool:
        return self.mode != "none"

    @property
    def skips_before_rollout(self) -> bool:
        return self.mode in ("greso", "greso_dynamic")


class NotEnoughGroups(RuntimeError):
    """Batch after batch without a signal: the data is too easy or too hard for this policy."""


class _Step:
    """What happened since begin_step."""

    def __init__(self, step: int, epoch: int) -> None:
        self.step = step
        self.epoch = epoch
        self.batches = 0
        self.to_draw = 0  # of the current batch
        self.last_batch = False
        self.candidates = 0
        self.skipped = {"easy": 0, "hard": 0}
        self.drawn = 0
        self.unjudged: dict[str, deque[int]] = defaultdict(deque)  # places in the order of drawing, by prompt
        self.kept: dict[int, RebuiltGroup] = {}
        self.judged_in_batch = 0
        self.kept_in_batch = 0
        self.finished = False
        self.rewards: list[list[float]] = []  # of the original rollouts of every judged group


class PromptFilter:
    """Chooses prompts and groups for one step at a time; only GRESO remembers anything between steps."""

    def __init__(self, config: FilterConfig, prompts_per_step: int, seed: int) -> None:
        self.config = config
        self.prompts_per_step = prompts_per_step
        self._seed = seed
        self._history = GresoHistory(config.greso) if config.skips_before_rollout else None
        self._step = _Step(0, 0)

    def begin_step(self, step: int, epoch: int) -> None:
        """`epoch`: how often the data has been gone through, from 0. Call next_batch_size next."""
        self._step = _Step(step, epoch)

    def next_batch_size(self) -> int | None:
        """How many prompts to roll out now, or None when the step has its groups."""
        now = self._step
        if now.to_draw or any(now.unjudged.values()):
            raise RuntimeError("the batch must be drawn, rolled out and judged whole before the next one is sized")
        planned = self._plan()
        if planned is None:
            return None
        if now.batches == self.config.max_batches:
            why = "is the data too easy or too hard? Raise algorithm.filter.max_batches or change data.train"
            if not any(map(any, now.rewards)):
                why = "every reward was 0: do prompts ask for answers in the form that the rule (rewards) reads?"
            raise NotEnoughGroups(
                f"step {now.step + 1}: only {len(now.kept)} of {self.prompts_per_step} groups with differing rewards after "
                f"{now.batches} batches ({now.drawn} prompts); {why}"
            )
        now.batches += 1
        now.to_draw, now.last_batch = planned
        now.judged_in_batch = now.kept_in_batch = 0
        return now.to_draw

    def _plan(self) -> tuple[int, bool] | None:
        """Size of the next batch, and whether the step makes do with it; None when the step is complete."""
        now = self._step
        missing = self.prompts_per_step - len(now.kept)
        if self.config.mode == "none":
            return None if now.batches else (self.prompts_per_step, True)
        if missing <= 0:
            return None
        if self.config.mode != "greso":
            return math.ceil(Fraction(repr(self.config.size_factor)) * self.prompts_per_step), False
        if now.batches == 0:
            return largest_batch(self.prompts_per_step, self.config.greso), False
        if now.last_batch:  # short, but never empty: adaptive_batch calls none the last before a group was kept
            return None
        return adaptive_batch(missing, now.kept_in_batch, now.judged_in_batch, self.prompts_per_step, self.config.greso)

    def propose(self, prompt_ids: Sequence[str]) -> list[bool]:
        """For each candidate: roll it out (True) or skip it. What is True must be rolled out and judged."""
        now = self._step
        if len(prompt_ids) > now.to_draw:
            raise ValueError(f"{len(prompt_ids)} candidates, but only {now.to_draw} more prompts fit in this batch")
        return [self._draw(prompt_id) for prompt_id in prompt_ids]

    def _draw(self, prompt_id: str) -> bool:
        now = self._step
        now.candidates += 1
        if self._history is not None:
            # numbered: a small data set comes round within a step, and must not be refused for ever
            chance = uniform(seed_for(self._seed, now.step, prompt_id, f"candidate {now.candidates}"))
            if chance < self._history.skip_probability(prompt_id):
                now.skipped[self._history.difficulty(prompt_id) or "hard"] += 1
                return False
        now.unjudged[prompt_id].append(now.drawn)
        now.drawn += 1
        now.to_draw -= 1
        return True

    def accept(self, groups: Sequence[RebuiltGroup]) -> list[RebuiltGroup]:
        """Judges rolled-out groups, in any order and any portions; returns those that may train."""
        now = self._step
        kept = []
        for group in groups:
            prompt_id = group.group.prompt.id
            if not now.unjudged[prompt_id]:
                raise ValueError(f"prompt {prompt_id!r} was not drawn in this batch, or is judged already")
            place = now.unjudged[prompt_id].popleft()
            rewards = [rollout.reward for rollout in group.group.originals]
            now.rewards.append(rewards)
            if self._history is not None:
                self._history.observe(prompt_id, rewards)
            now.judged_in_batch += 1
            if not self.config.drops_zero_signal or group.has_signal:
                now.kept_in_batch += 1
                now.kept[place] = group
                kept.append(group)
        return kept

    def finish(self) -> list[RebuiltGroup]:
        """The groups that train, in the order their prompts were drawn, surplus cut. Adapts GRESO's p, once."""
        now = self._step
        if now.to_draw or any(now.unjudged.values()) or self._plan() is not None:
            raise RuntimeError("the step is not over: go on until next_batch_size returns None")
        # from the second epoch on: before it every prompt is new, and p decides nothing that the ratios could show
        if self._history is not None and now.epoch > 0 and not now.finished:
            self._history.adapt(self._history.ratios(now.rewards))
        now.finished = True
        return [now.kept[place] for place in sorted(now.kept)][: self.prompts_per_step]

    def metrics(self) -> dict[str, float]:
        """Of the step so far."""
        now = self._step
        judged = max(1, len(now.rewards))
        metrics = {
            "filter/batches": float(now.batches),
            "filter/rolled_out": float(now.drawn),
            "filter/dropped": float(len(now.rewards) - len(now.kept)),
            "filter/dropped_ratio": (len(now.rewards) - len(now.kept)) / judged,
            "filter/surplus": float(max(0, len(now.kept) - self.prompts_per_step)),
            "filter/missing": float(max(0, self.prompts_per_step - len(now.kept))),
        }
        if self._history is not None:
            ratios = self._history.ratios(now.rewards)
            metrics |= {
                "filter/skipped_easy": float(now.skipped["easy"]),
                "filter/skipped_hard": float(now.skipped["hard"]),
                "filter/easy_ratio": ratios["easy"],
                "filter/hard_ratio": ratios["hard"],
                "filter/p_easy": self._history.p_easy,
                "filter/p_hard": self._history.p_hard,
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; complete between finish and begin_step."""
        return {} if self._history is None else {"greso": self._history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("greso" in state) != (self._history is not None):
            raise ValueError(
                f"the checkpoint {'has' if 'greso' in state else 'lacks'} GRESO's history, "
                f"but filter.mode is {self.config.mode!r}"
            )
        if self._history is not None:
            self._history.load_state_dict(state["greso"])
