"""The difference between trainer and engine on what was sampled, and what is left out of the update for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lens_megatron.guards import checks
from lens_megatron.guards.config import GuardConfig
from lens_megatron.samples import number_tensor
from lens_megatron.update import Evaluated


def watch_mismatch(
    groups: Sequence[list[Evaluated]], config: GuardConfig, bound: float, temperature: float
) -> tuple[list[list[Evaluated]], dict[str, float]]:
    """The groups to train on, and metrics. Every rank has the same numbers and decides alike.

    Samples whose pi_old is read off the training pass are not known yet: `after_update` sees them.
    """
    if config.on_logprob_diff == "stop":
        checks.engine_difference(_mean(groups, False) or 0.0, _mean(groups, True), bound, temperature)
    if not config.leaves_out:
        return [list(group) for group in groups], {}
    by_token = config.on_logprob_diff == "mask_tokens"
    agree = [[_tokens(e, config.token_diff) if by_token else _whole(e, bound) for e in group] for group in groups]
    tokens = sum(len(e.sample.response) for group in groups for e in group)
    kept = sum(int(agree_R.sum()) for group in agree for agree_R in group)
    share = 1 - kept / tokens if tokens else 0.0
    over = f"over guards.{'token_diff' if by_token else 'logprob_diff'} {config.token_diff if by_token else bound:g}"
    checks.left_out(share, config.most_left_out, f"{'tokens' if by_token else 'sequences'} {over}")
    trusted = [
        [e if bool(agree_R.all()) else replace(e, trusted_R=agree_R) for e, agree_R in zip(group, part, strict=True)]
        for group, part in zip(groups, agree, strict=True)
    ]
    return trusted, {"guards/left_out": share}


def _both(e: Evaluated) -> tuple[Tensor, Tensor] | None:
    """What trainer and engine say of its tokens; None when the trainer says so only while it trains."""
    return None if e.proximal_R is None else (e.proximal_R, number_tensor(e.sample.behaviour_logprobs))


def _mean(groups: Sequence[list[Evaluated]], purified: bool) -> float | None:
    chosen = [_both(e) for group in groups for e in group if e.sample.purified is purified]
    known = [both for both in chosen if both is not None]
    return checks.mean_difference([a for a, _ in known], [b for _, b in known]) if known else None


def _tokens(e: Evaluated, bound: float) -> Tensor:
    """Which of its tokens may be trained on."""
    both = _both(e)
    return torch.ones(len(e.sample.response)).bool() if both is None else checks.token_outliers(*both, bound)


def _whole(e: Evaluated, bound: float) -> Tensor:
    both = _both(e)
    agree = both is None or not checks.over(checks.mean_difference([both[0]], [both[1]]), bound)
    return torch.full((len(e.sample.response),), agree)
