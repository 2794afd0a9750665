"""The rescue slot: replace failed rollouts by successes found under the purified prompt (Eq. 2 and 3, Algorithm 1).

Y: the m rollouts of x; Y+ and Y- its successes and failures; a = |Y+| / m.  Y': the m rollouts of x', P its
successes.  G: the group that trains.  What success and accuracy mean for graded rewards: outcomes.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from lens_megatron.algorithms.outcomes import SAME_REWARD, LearnsFrom, is_success, success_count, zero_variance
from lens_megatron.purification.config import PurificationConfig
from lens_megatron.purification.seeds import choose, seed_for
from lens_megatron.types import Group, Rollout


@dataclass(frozen=True)
class RescueConfig(PurificationConfig):
    """When prompts are purified and what their new rollouts replace; how they are purified is inherited.

    mode               none: G = Y always.
    tau                rescue when a < tau (strictly).
    success_threshold  a rollout succeeds when its reward reaches this.
    benefit_check      Eq. 2: replace only if acc(x') > acc(x), strictly.
    replacement        all: every member of P joins, min(|Y-|, |P|) failures leave, G may exceed m (the paper).
                       one_to_one: no more join than leave.  union: nothing leaves and all of Y' joins, failures
                       included (the group that the `mixture` ratio needs).
    keep_failures      f > 0: at most |Y-| - f join, so that f failures stay.
    max_success_share  s < 1: at most floor(s m) successes in G.
    zero_signal        keep: a rescued group may end without a signal and teach nothing.  original: it then falls
                       back to Y if a > 0, where Y still teaches.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    mode: Literal["none", "purification"] = "none"
    tau: float = 0.5
    success_threshold: float = 0.5
    benefit_check: bool = True
    replacement: Literal["all", "one_to_one", "union"] = "all"
    keep_failures: int = 0
    max_success_share: float = 1.0
    zero_signal: Literal["keep", "original"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau is a success rate between 0 and 1: got {self.tau}")
        if not 0 < self.success_threshold <= 1:
            raise ValueError(f"success_threshold is above 0 and at most 1: got {self.success_threshold}")
        if self.keep_failures < 0:
            raise ValueError(f"keep_failures cannot be negative: got {self.keep_failures}")
        if not 0 < self.max_success_share <= 1:
            raise ValueError(f"max_success_share is above 0 and at most 1: got {self.max_success_share}")
        if self.replacement == "union" and (self.keep_failures > 0 or self.max_success_share < 1):
            raise ValueError("replacement 'union' keeps every rollout: keep_failures and max_success_share must be off")


Origin = Literal["success", "failure", "purified", "purified_failure"]
Why = Literal[
    "off",  # mode none
    "enough_success",  # a >= tau
    "not_purified",  # a < tau, but there was no x' to roll out
    "not_beneficial",  # acc(x') <= acc(x)
    "no_success",  # benefit check off, and P is empty
    "no_room",  # keep_failures or max_success_share leave no place
    "zero_signal",  # replaced, found without signal, taken back
    "replaced",
]


@dataclass(frozen=True)
class Member:
    """A rollout of G. Origin: Y+, a failure of Y that stays, P, or (union only) a failure of Y'."""

    rollout: Rollout
    origin: Origin
    success: bool


@dataclass(frozen=True)
class RebuiltGroup:
    """G, and how it came about. Members: those of Y by index, then those of Y' by index."""

    group: Group
    members: tuple[Member, ...]
    why: Why
    success_rate: float  # a, of Y, whatever G became: Eq. 4's scaling factor
    successes: int  # |Y+|
    purified_successes: int = 0  # |P|, before any limit on how many join
    removed: tuple[Rollout, ...] = ()  # R
    learns_from: LearnsFrom = "spread"  # AdvantageConfig.learns_from

    @property
    def rescued(self) -> bool:
        return self.why == "replaced"

    @property
    def rolled_out_again(self) -> bool:
        """A rescue was needed and tried, whatever came of it."""
        return self.why in ("not_beneficial", "no_success", "no_room", "zero_signal", "replaced")

    @property
    def purified_success_rate(self) -> float | None:
        """acc(x')."""
        return self.purified_successes / len(self.group.purified) if self.rolled_out_again else None

    @property
    def improved(self) -> bool:
        """Eq. 2's g, computed even where the benefit check is off."""
        accuracy = self.purified_success_rate
        return accuracy is not None and accuracy > self.success_rate

    @property
    def has_signal(self) -> bool:
        """Whether G can teach."""
        rewards = [member.rollout.reward for member in self.members]
        if self.learns_from != "original":
            return self.learns_from == "any" or not zero_variance(rewards)
        mean = sum(rollout.reward for rollout in self.group.originals) / len(self.group.originals)
        return any(abs(reward - mean) > SAME_REWARD for reward in rewards)


def needs_rescue(rewards: Sequence[float], config: RescueConfig) -> bool:
    """a < tau, for all m rewards of Y."""
    # the quotient, not tau * m: k/m and a tau written as that decimal round to the same float, their products need not
    return config.mode != "none" and success_count(rewards, config.success_threshold) / len(rewards) < config.tau


def rescue_is_certain(finished_rewards: Sequence[float], n: int, config: RescueConfig) -> bool:
    """a < tau even if every rollout of Y still running succeeds. Starting Y' then changes no distribution."""
    still_running = n - len(finished_rewards)
    best = success_count(finished_rewards, config.success_threshold) + still_running
    return config.mode != "none" and best / n < config.tau


def rescue_is_moot(finished_rewards: Sequence[float], n: int, config: RescueConfig) -> bool:
    """a >= tau even if every rollout of Y still running fails. It looks at Y alone, so cancelling Y' is unbiased."""
    return config.mode == "none" or success_count(finished_rewards, config.success_threshold) / n >= config.tau


def rebuild_group(
    group: Group, config: RescueConfig, seed: int, step: int, learns_from: LearnsFrom = "spread"
) -> RebuiltGroup:
    """Eq. 2 and 3. Who leaves Y- and, under a limit, who of P joins is drawn uniformly, by prompt and step.

    `learns_from` decides what can teach, for `zero_signal` and for whoever asks the group later.
    """
    _check_complete(group)
    originals = sorted(group.originals, key=lambda rollout: rollout.index)
    prime = sorted(group.purified, key=lambda rollout: rollout.index)
    Y = [Member(y, "success" if _succeeds(y, config) else "failure", _succeeds(y, config)) for y in originals]
    failures = [member for member in Y if not member.success]
    P = [Member(y, "purified", True) for y in prime if _succeeds(y, config)]
    successes = len(Y) - len(failures)

    def result(why: Why, members: Sequence[Member] = Y) -> RebuiltGroup:
        staying = {member.rollout.index for member in members if not member.rollout.purified}
        removed = tuple(rollout for rollout in originals if rollout.index not in staying)
        a = successes / len(Y)
        return RebuiltGroup(group, tuple(members), why, a, successes, len(P), removed, learns_from)

    if not needs_rescue([y.reward for y in originals], config):
        return result("off" if config.mode == "none" else "enough_success")
    if not prime:
        return result("not_purified")
    if config.benefit_check and not len(P) / len(prime) > successes / len(Y):
        return result("not_beneficial")
    if config.replacement == "union":
        rebuilt = result("replaced", [*Y, *_all_of(prime, config)])
    elif not P:
        return result("no_success")
    else:
        places = places_for_purified(successes, len(failures), len(P), config)
        if places == 0:
            return result("no_room")
        prompt_id = group.prompt.id
        leaving = choose(failures, min(len(failures), places), seed_for(seed, step, prompt_id, "replaced failures"))
        joining = choose(P, places, seed_for(seed, step, prompt_id, "joining successes"))
        gone = {member.rollout.index for member in leaving}
        rebuilt = result("replaced", [*(member for member in Y if member.rollout.index not in gone), *joining])
    if config.zero_signal == "original" and successes > 0 and not rebuilt.has_signal:
        return result("zero_signal")
    return rebuilt


def places_for_purified(successes: int, failures: int, found: int, config: RescueConfig) -> int:
    """How many of the `found` = |P| join G."""
    places = found
    if config.replacement == "one_to_one":
        places = min(places, failures)
    if config.keep_failures > 0:
        places = min(places, max(0, failures - config.keep_failures))
    if config.max_success_share < 1:
        allowed = math.floor(Fraction(repr(config.max_success_share)) * (successes + failures))
        places = min(places, max(0, allowed - successes))
    return places


def _all_of(prime: Sequence[Rollout], config: RescueConfig) -> list[Member]:
    return [Member(y, "purified" if _succeeds(y, config) else "purified_failure", _succeeds(y, config)) for y in prime]


def _succeeds(rollout: Rollout, config: RescueConfig) -> bool:
    return is_success(rollout.reward, config.success_threshold)


def _check_complete(group: Group) -> None:
    """Groups arrive whole: one missing its slowest rollouts is biased towards short answers. And every rollout carries
    the prompt it was sampled under, or pi_old would be scored under another and Eq. 5 be silently wrong."""
    where = f"group of prompt {group.prompt.id!r}"
    if not group.originals:
        raise ValueError(f"{where} has no rollout")
    if group.purified and len(group.purified) != len(group.originals):
        raise ValueError(f"{where}: {len(group.purified)} rescue rollouts for {len(group.originals)} originals")
    x = group.prompt.tokens
    x_prime = group.purified_prompt.tokens if group.purified_prompt else x
    for rollouts, purified, tokens in ((group.originals, False, x), (group.purified, True, x_prime)):
        if len({rollout.index for rollout in rollouts}) != len(rollouts):
            raise ValueError(f"{where}: two rollouts have the same index")
        if any(rollout.purified != purified or rollout.roll_tokens != tokens for rollout in rollouts):
            raise ValueError(f"{where}: a rollout is marked or sampled under the other prompt")
    if any(rollout.finish == "abort" for rollout in group.originals):
        raise ValueError(f"{where}: an original rollout was aborted")
    if any(rollout.finish == "abort" and rollout.reward != 0 for rollout in group.purified):
        raise ValueError(f"{where}: an aborted rollout has a reward")
