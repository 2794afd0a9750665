"""What flows through the loop: prompts become rollouts, rollouts form groups, groups become samples.

Three policies have three names everywhere. *behaviour*: what the engine sampled from. *proximal*: pi_old, the
trainer's weights before this update. *current*: pi_theta. For purified rollouts behaviour and proximal are under x',
current is under x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lens_megatron.routed_experts import Routing

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """x: one row of the data, tokenised with the model's template."""

    id: str
    tokens: tuple[int, ...]
    question: tuple[int, int]  # half-open span of the user's own question in `tokens`
    answer: str
    source: str = ""
    text: str = ""  # the user's question, for people
    planted: tuple[int, ...] = ()  # positions of noise that was put there on purpose, ascending; for studies


@dataclass(frozen=True)
class PurifiedPrompt:
    """x': a prompt without its interference tokens."""

    prompt_id: str
    tokens: tuple[int, ...]
    deleted: tuple[int, ...]  # positions in the original prompt's tokens, ascending


@dataclass(frozen=True)
class Rollout:
    """One response, and the prompt it was really sampled under."""

    prompt_id: str
    roll_tokens: tuple[int, ...]  # x, or x' when purified
    response: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]  # of the response's tokens, as sampled
    finish: FinishReason
    index: int  # place in its group: the seed of its sampling and its order in the batch
    purified: bool = False
    reward: float = 0.0
    weight_version: int = 0
    routing: Routing | None = None  # of roll_tokens and response, where the engine was asked for it


@dataclass(frozen=True)
class Group:
    """Y, and Y' when the prompt was purified and rolled out again (or resampled)."""

    prompt: Prompt
    originals: tuple[Rollout, ...]
    purified_prompt: PurifiedPrompt | None = None
    purified: tuple[Rollout, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One rollout as the update sees it: trained under `prompt_tokens` (x), proximal log-probs under `roll_tokens`."""

    prompt_id: str
    prompt_tokens: tuple[int, ...]
    roll_tokens: tuple[int, ...]
    response: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    reward: float
    purified: bool
    advantage: float
    weight: float  # w~ of Eq. 4
    purified_tokens: tuple[int, ...] | None = None  # x' of its prompt, where there is one
    routing: Routing | None = None  # of roll_tokens and response: rollout.routing_replay
