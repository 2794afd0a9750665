"""One prompt's rollouts while they come in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout


@dataclass(frozen=True)
class Job:
    group: int
    index: int
    purified: bool
    speculative: bool = False  # when it was submitted


class GroupState:
    """A group while it fills."""

    def __init__(self, prompt: Prompt, purified_prompt: PurifiedPrompt | None, n: int) -> None:
        self.prompt = prompt
        self.purified_prompt = purified_prompt
        self.originals: list[Rollout | None] = [None] * n
        self.rescues: list[Rollout | None] = [None] * n
        self.scored: list[float] = []  # rewards of originals, as they came
        self.rescues_scored = 0
        self.rescue: Literal["open", "certain", "moot"] = "open" if purified_prompt else "moot"
        self.unsubmitted = list(range(n)) if purified_prompt else []  # rescue rollouts, by index
        self.rescue_ids: list[str] = []  # of requests made for them

    def settled(self) -> bool:
        n = len(self.originals)
        return len(self.scored) == n and (self.rescue == "moot" or self.rescues_scored == n)

    def group(self) -> Group:
        purified = tuple(r for r in self.rescues if r is not None) if self.rescue == "certain" else ()
        purified_prompt = self.purified_prompt if purified else None
        return Group(self.prompt, tuple(r for r in self.originals if r is not None), purified_prompt, purified)
