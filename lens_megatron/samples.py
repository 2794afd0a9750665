"""Rebuilt groups into the samples that the update trains on: advantages, weights, and the prompts each is scored under."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lens_megatron.algorithms.advantages import AdvantageConfig, group_advantages, overlong_penalty
from lens_megatron.algorithms.rescue import RebuiltGroup
from lens_megatron.types import Rollout, Sample

T = TypeVar("T")


def samples_of_group(group: RebuiltGroup, config: AdvantageConfig, max_response_tokens: int) -> list[Sample]:
    """One sample a member of G, in the members' order."""
    rollouts = [member.rollout for member in group.members]
    advantages, weights = group_advantages(
        _shaped_rewards(rollouts, config, max_response_tokens),
        torch.tensor([member.success for member in group.members]),
        torch.tensor([rollout.purified for rollout in rollouts]),
        group.success_rate,
        config,
        original_mean=_shaped_rewards(group.group.originals, config, max_response_tokens).mean().item(),
    )
    prompt, purified = group.group.prompt, group.group.purified_prompt
    return [
        Sample(
            prompt_id=prompt.id,
            prompt_tokens=prompt.tokens,
            roll_tokens=rollout.roll_tokens,
            response=rollout.response,
            behaviour_logprobs=rollout.behaviour_logprobs,
            reward=rollout.reward,
            purified=rollout.purified,
            advantage=advantage,
            weight=weight,
            purified_tokens=purified.tokens if purified and group.rescued else None,  # else G is Y, drawn from x alone
            routing=rollout.routing,
        )
        for rollout, advantage, weight in zip(rollouts, advantages.tolist(), weights.tolist(), strict=True)
    ]


def _shaped_rewards(rollouts: Sequence[Rollout], config: AdvantageConfig, max_response_tokens: int) -> Tensor:
    """What the advantage sees of them, members and originals alike: the verifier's, less the length penalty."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    if config.overlong is None:
        return rewards
    lengths = torch.tensor([len(rollout.response) for rollout in rollouts])
    return rewards + overlong_penalty(lengths, max_response_tokens, config.overlong)


def split_groups(groups: Sequence[list[T]], parts: int) -> list[list[list[T]]]:
    """Mini-batches of whole groups, as even as can be, in order."""
    parts = min(parts, len(groups))
    bounds = [round(part * len(groups) / parts) for part in range(parts + 1)]
    return [list(groups[start:stop]) for start, stop in pairwise(bounds)]


def token_tensor(*parts: Sequence[int]) -> Tensor:
    """Token ids end to end; torch.tensor takes seven times as long, and a step has a million of them."""
    return torch.from_numpy(np.fromiter(chain(*parts), np.int64, sum(map(len, parts))))


def number_tensor(values: Sequence[float]) -> Tensor:
    """fp32, rounded as torch.tensor rounds."""
    return torch.from_numpy(np.fromiter(values, np.float32, len(values)))
