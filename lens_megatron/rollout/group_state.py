"""One prompt's rollouts while they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_megatron.rollout.engine import Finished
from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout


@dataclass(frozen=True)
class Job:
    group: int
    index: int
    purified: bool
    speculative: bool = False  # when it was submitted
    begun: Finished | None = None  # what it had when it was aborted: it goes on from there


class GroupState:
    """A group while it fills."""

    def __init__(self, number: int, prompt: Prompt, purified_prompt: PurifiedPrompt | None, n: int) -> None:
        self.prompt = prompt
        self.purified_prompt = purified_prompt
        self.originals: list[Rollout | None] = [None] * n
        self.rescues: list[Rollout | None] = [None] * n
        self.scored: list[float] = []  # rewards of originals, as they came
        self.rescues_scored = 0
        self.rescue: Literal["open", "certain", "moot"] = "open" if purified_prompt else "moot"
        self.unsubmitted = [Job(number, i, True) for i in range(n)] if purified_prompt else []  # rescues, by index
        self.rescue_ids: list[str] = []  # of requests made for them

    def roll_tokens(self, job: Job) -> tuple[int, ...]:
        """The prompt that a rollout is sampled under."""
        return self.purified_prompt.tokens if job.purified and self.purified_prompt else self.prompt.tokens

    def settled(self) -> bool:
        n = len(self.originals)
        return len(self.scored) == n and (self.rescue == "moot" or self.rescues_scored == n)

    def group(self) -> Group:
        purified = tuple(r for r in self.rescues if r is not None) if self.rescue == "certain" else ()
        purified_prompt = self.purified_prompt if purified else None
        return Group(self.prompt, tuple(r for r in self.originals if r is not None), purified_prompt, purified)
