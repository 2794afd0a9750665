"""Rebuilt groups as samples: which prompts each is weighed under."""

from __future__ import annotations

from dataclasses import replace

from lens_megatron.algorithms.advantages import AdvantageConfig
from lens_megatron.algorithms.rescue import RescueConfig, rebuild_group
from lens_megatron.samples import samples_of_group
from tests.algorithms.rescue_groups import X_PRIME, binary, group

UNION = RescueConfig(mode="purification", replacement="union")


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
