"""What groups tell about a step: rewards, rescues, and where the learning signal is lost.

Pass every group that was rolled out, before a filter drops any: the paper's ratios are about prompts, not about what
trains. Y is what the policy did under the original prompts; G is what trains, and its zero-reward ratio falls by
construction, so it is named apart. A mean over nothing is left out, never reported as 0.

acc(x') - acc(x) is biased upwards, twice: prompts are chosen for a low acc(x), and the benefit check keeps the lucky
ones (the winner's curse: resampling the same prompt passes it too). Compare it with a run of strategy `resample`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from lens_megatron.algorithms.outcomes import zero_variance
from lens_megatron.algorithms.rescue import RebuiltGroup
from lens_megatron.purification.strategies import Outcome

Bucket = Literal["failure", "low", "mid", "high", "solved"]
BUCKETS: tuple[Bucket, ...] = ("failure", "low", "mid", "high", "solved")
ZeroSignal = Literal["perfect_purification", "all_tied", "all_failed", "all_solved"]
ZERO_SIGNALS: tuple[ZeroSignal, ...] = (
    "perfect_purification",  # rescued, and no failure is left
    "all_tied",  # would have been rescued, but no score was above the noise floor
    "all_failed",  # graded rewards: with equal partial credit
    "all_solved",  # graded rewards: with equal credit
)


def group_metrics(groups: Sequence[RebuiltGroup], outcomes: Iterable[Outcome] = ()) -> dict[str, float]:
    """Metrics of one step. `outcomes`: of the purification of these prompts, for what the groups do not show."""
    by_prompt = {outcome.prompt_id: outcome for outcome in outcomes}
    kinds = [zero_signal_kind(group, by_prompt) for group in groups]
    originals = [rollout for group in groups for rollout in group.group.originals]
    metrics = {
        "reward": _mean(rollout.reward for rollout in originals),
        "success": _mean(group.success_rate for group in groups),
        "zero_reward_ratio": _mean(group.successes == 0 for group in groups),
        "zero_reward_ratio_trained": _mean(_trained_successes(group) == 0 for group in groups),
        "success_trained": _mean(_trained_successes(group) / len(group.members) for group in groups),
        "zero_signal_ratio": _mean(kind is not None for kind in kinds),
        "groups_destroyed": _mean(_had_signal(group) and not group.has_signal for group in groups),
        "groups_revived": _mean(not _had_signal(group) and group.has_signal for group in groups),
    }
    metrics |= {f"zero_signal/{name}": _mean(kind == name for kind in kinds) for name in ZERO_SIGNALS}
    before = [bucket(group.successes, len(group.group.originals)) for group in groups]
    after = [bucket(_trained_successes(group), len(group.members)) for group in groups]
    metrics |= {f"success_distribution/original/{name}": _mean(b == name for b in before) for name in BUCKETS}
    metrics |= {f"success_distribution/trained/{name}": _mean(b == name for b in after) for name in BUCKETS}
    return _known(
        metrics
        | _rescue_metrics(groups)
        | _outcome_metrics(list(by_prompt.values()))
        | _planted_metrics(groups, by_prompt)
    )


def _rescue_metrics(groups: Sequence[RebuiltGroup]) -> dict[str, float | None]:
    tried = [group for group in groups if group.rolled_out_again]
    whole = [group for group in tried if all(rollout.finish != "abort" for rollout in group.group.purified)]
    deleted = [len(x.deleted) for group in tried if (x := group.group.purified_prompt) is not None]
    stayed = [member.rollout for group in tried for member in group.members if member.origin == "failure"]
    failures = stayed + [rollout for group in tried for rollout in group.removed]
    joined = [member.rollout for group in tried for member in group.members if member.origin == "purified"]
    spare = [group for group in groups if group.group.purified and not group.rolled_out_again]
    return {
        "purified_ratio": _mean(group.rolled_out_again for group in groups),
        # of the prompts that were rolled out again (the paper's 20%); 0 of 0 reads 0, next to a purified_ratio of 0
        "improved_ratio": _mean(group.improved for group in tried) or 0.0,
        "deleted_tokens": float(sum(deleted)),
        "deleted_tokens_per_prompt": _mean(deleted),
        "rescue/replaced": _mean(group.rescued for group in groups),
        "rescue/not_purified": _mean(group.why == "not_purified" for group in groups),
        "rescue/no_room": _mean(group.why == "no_room" for group in groups),
        "rescue/zero_signal_fallback": _mean(group.why == "zero_signal" for group in groups),
        "rescue/signal_window": _mean(in_signal_window(group) for group in tried),
        # cancelled ones did not improve but have no acc(x') either: this mean leaves them out and so flatters, and
        # the count beside it says by how many
        "rescue/improvement": _mean((group.purified_success_rate or 0.0) - group.success_rate for group in whole),
        "rescue/cancelled": float(len(tried) - len(whole)),
        "rescue/discarded_rollouts": float(sum(len(group.group.purified) for group in spare)),
        "rescue/purified_rollout_share": _mean(member.rollout.purified for group in groups for member in group.members),
        "rescue/response_tokens_failures": _mean(len(rollout.response) for rollout in failures),
        "rescue/response_tokens_purified": _mean(len(rollout.response) for rollout in joined),
    }


def _outcome_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    if not outcomes:
        return {}
    return {
        "purification/tied": _mean(outcome.tied for outcome in outcomes),
        "purification/nothing_eligible": _mean(outcome.kind == "nothing_eligible" for outcome in outcomes),
        "purification/scores_above_floor": _mean(
            outcome.above_floor / outcome.eligible for outcome in outcomes if outcome.above_floor is not None
        ),
    }


def _planted_metrics(groups: Sequence[RebuiltGroup], outcomes: Mapping[str, Outcome]) -> dict[str, float | None]:
    """Does the deletion find noise that was planted on purpose? Of purified prompts with some; shares of tokens, not
    means of prompts' shares. Chance: the precision of deleting eligible tokens at random."""
    deleted = planted = hits = eligible = 0
    for group in groups:
        noise = set(group.group.prompt.planted)
        outcome = outcomes.get(group.group.prompt.id)
        if noise and outcome is not None and outcome.purified_prompt is not None:
            deleted += len(outcome.purified_prompt.deleted)
            planted += len(noise)
            hits += len(noise.intersection(outcome.purified_prompt.deleted))
            eligible += outcome.eligible
    if not deleted:
        return {}
    return {
        "purification/planted_precision": hits / deleted,
        "purification/planted_recall": hits / planted,
        "purification/planted_chance": planted / eligible,
    }


def bucket(successes: int, rollouts: int) -> Bucket:
    """Figure 5's categories. Its edges are not printed; ours: 0, below a third, to two thirds, below 1, and 1."""
    if successes == 0:
        return "failure"
    if successes == rollouts:
        return "solved"
    if 3 * successes < rollouts:
        return "low"
    return "mid" if 3 * successes <= 2 * rollouts else "high"


def in_signal_window(group: RebuiltGroup) -> bool:
    """m a < |P| < m (1 - a): outside it a literal rescue does not happen, or leaves no failure (0/1 rewards)."""
    return group.successes < group.purified_successes < len(group.group.originals) - group.successes


def zero_signal_kind(group: RebuiltGroup, outcomes: Mapping[str, Outcome] | None = None) -> ZeroSignal | None:
    """Why G has no signal, or None where it has one."""
    if group.has_signal:
        return None
    if group.rescued:
        return "perfect_purification"
    outcome = (outcomes or {}).get(group.group.prompt.id)
    if group.why == "not_purified" and outcome is not None and outcome.tied:
        return "all_tied"
    return "all_failed" if group.successes == 0 else "all_solved"


def top_k_overlap(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> float | None:
    """How stable the deleted positions are between two scorings of the same prompts: the mean of
    |both| / max(|before|, |after|) over prompts in both, or None without one. Chance level is about gamma."""
    in_both = sorted(before.keys() & after.keys())  # a set's order, and so the sum's last digit, differs by process
    shared = [
        len(set(before[prompt_id]) & set(after[prompt_id])) / max(len(before[prompt_id]), len(after[prompt_id]))
        for prompt_id in in_both
        if before[prompt_id] or after[prompt_id]
    ]
    return _mean(shared)


def _trained_successes(group: RebuiltGroup) -> int:
    return sum(member.success for member in group.members)


def _had_signal(group: RebuiltGroup) -> bool:
    return group.learns_from == "any" or not zero_variance([rollout.reward for rollout in group.group.originals])


def _mean(values: Iterable[float | int]) -> float | None:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else None


def _known(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}
