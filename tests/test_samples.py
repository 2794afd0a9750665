"""Rebuilt groups as samples: which prompts each is weighed under, and what its reward is compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lens_megatron.algorithms.advantages import AdvantageConfig, OverlongConfig
from lens_megatron.algorithms.rescue import RescueConfig, rebuild_group
from lens_megatron.samples import samples_of_group
from tests.algorithms.rescue_groups import X_PRIME, binary, group

UNION = RescueConfig(mode="purification", replacement="union")
LIMIT, OVERLONG = 4, OverlongConfig(buffer_tokens=4)


def test_only_a_group_drawn_from_both_prompts_is_weighed_under_both() -> None:
    """Where x' did not help, G is Y alone, and no mixture drew it."""
    helped, in_vain = (group(binary(1), binary(found)) for found in (5, 0))
    drawn = rebuild_group(helped, UNION, 0, 0)
    assert len(drawn.members) == 16
    assert {s.purified_tokens for s in samples_of_group(drawn, AdvantageConfig(), 64)} == {X_PRIME}
    plain = rebuild_group(in_vain, UNION, 0, 0)
    assert plain.why == "not_beneficial" and len(plain.members) == 8
    assert {s.purified_tokens for s in samples_of_group(plain, AdvantageConfig(), 64)} == {None}
    never = replace(helped, purified=(), purified_prompt=None)
    enough = rebuild_group(never, replace(UNION, mode="none"), 0, 0)
    assert {s.purified_tokens for s in samples_of_group(enough, AdvantageConfig(), 64)} == {None}


def advantages(y: list[float], again: list[float], overlong: OverlongConfig | None) -> list[float]:
    config = AdvantageConfig(baseline="original", std="none", overlong=overlong)
    rebuilt = rebuild_group(group(y, again), RescueConfig(mode="purification"), seed=0, step=0)
    return [sample.advantage for sample in samples_of_group(rebuilt, config, LIMIT)]


def test_the_mean_of_the_originals_has_the_length_penalty_too() -> None:
    """Responses of 1, 2, 3 and 4 tokens lose 1/4, 2/4, 3/4 and 4/4 of a reward: what is left is compared with its own
    mean, 3/8. Compared with the verifier's mean of 1, every right answer would be pushed down."""
    assert advantages([1.0] * 4, [], OVERLONG) == pytest.approx([3 / 8, 1 / 8, -1 / 8, -3 / 8])


def test_purified_successes_are_measured_against_the_penalised_originals() -> None:
    """Y, all failures, averages -5/8; purified successes of 1 and 2 tokens have 3/4 and 2/4 left."""
    found = advantages([0.0] * 4, [1.0, 1.0, 0.0, 0.0], OVERLONG)
    assert found[-2:] == pytest.approx([3 / 4 + 5 / 8, 2 / 4 + 5 / 8])
    assert advantages([0.0] * 4, [1.0, 1.0, 0.0, 0.0], None) == [0.0, 0.0, 1.0, 1.0]
