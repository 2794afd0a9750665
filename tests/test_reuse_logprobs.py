"""Where pi_old is read off the training pass, and where it must be scored: `update.current_is_proximal`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_megatron.mcore.logprobs import TokenScores
from lens_megatron.presets import load_algorithm
from lens_megatron.types import Sample
from lens_megatron.update import UpdateConfig, evaluate_samples

GROUPS, N = 4, 3


def sample(group: int, index: int, purified: bool) -> Sample:
    x = (1, 2, 3, 10 + group)
    return Sample(
        prompt_id=f"p{group}",
        prompt_tokens=x,
        roll_tokens=(1, 3, 10 + group) if purified else x,
        response=(50 + index, 60 + group),
        behaviour_logprobs=(-1.0, -2.0),
        reward=1.0,
        purified=purified,
        advantage=0.5,
        weight=1.0,
        purified_tokens=(1, 3, 10 + group),
    )


class Scorer:
    """Stands in for a policy: notes what it is asked to score."""

    chunks = ()

    def __init__(self) -> None:
        self.asked: set[tuple[int, ...]] = set()

    def score(self, sequences: list[Tensor], budget: int, temperature: float, entropy: bool) -> TokenScores:
        self.asked |= {tuple(sequence.tolist()) for sequence in sequences}
        values = [torch.zeros(len(sequence)) for sequence in sequences]
        return TokenScores(values, values)


def scored(algorithm: Any, update: UpdateConfig, staleness: int = 0, **changes: Any) -> set[Sample]:
    """The samples whose pi_old is scored; those under x' among them whatever happens. The last of each group is P."""
    groups = [[replace(sample(g, i, i == N - 1), **changes) for i in range(N)] for g in range(GROUPS)]
    policy = Scorer()
    loss = load_algorithm(algorithm).loss
    evaluated = evaluate_samples(groups, policy, Scorer(), loss, update, 1.0, staleness)  # type: ignore[arg-type]
    for e in (e for group in evaluated for e in group):
        asked = (*e.sample.roll_tokens, *e.sample.response) in policy.asked
        assert asked == (e.proximal_R is not None)
    return {e.sample for group in evaluated for e in group if e.proximal_R is not None}


LENS: Any = {"preset": "lens", "loss": {"kl_coef": 0.001}}


def test_only_purified_rollouts_are_scored_in_a_step_of_one_update() -> None:
    assert {s.purified for s in scored(LENS, UpdateConfig())} == {True}


def test_the_second_minibatch_meets_moved_weights() -> None:
    found = scored(LENS, UpdateConfig(minibatches=2))
    originals = {(s.prompt_id, s.response) for s in found if not s.purified}
    assert originals == {(f"p{g}", (50 + i, 60 + g)) for g in (2, 3) for i in range(N - 1)}
    assert sum(s.purified for s in found) == GROUPS


@pytest.mark.parametrize(
    "why",
    [
        {"update": UpdateConfig(reuse_logprobs=False)},
        {"update": UpdateConfig(epochs=2)},
        {"staleness": 1},
        {"algorithm": "archer"},  # an entropy split needs the whole mini-batch first
        {"algorithm": {"preset": "lens", "loss": {"purified_ratio": "none"}}},  # asks for pi_old under x itself
        {"roll_tokens": (9, 9)},  # rolled out under another prompt, whatever it is called
    ],
    ids=str,
)
def test_everything_is_scored_where_it_cannot_be_proved(why: dict[str, Any]) -> None:
    options = {"algorithm": LENS, "update": UpdateConfig(), **why}
    assert len(scored(**options)) == GROUPS * N


def test_nothing_is_scored_where_the_engine_stands_for_pi_old() -> None:
    policy = Scorer()
    groups = [[sample(0, 0, False)]]
    update = UpdateConfig(old_logprobs="engine")
    loss = load_algorithm("grpo").loss
    [[evaluated]] = evaluate_samples(groups, policy, Scorer(), loss, update, 1.0)  # type: ignore[arg-type]
    assert not policy.asked and evaluated.proximal_R is not None
    assert evaluated.proximal_R.tolist() == [-1.0, -2.0]


def test_where_the_engine_stands_for_pi_old_it_does_so_under_x_too() -> None:
    """`resample` asks for pi_old under x; every rollout of it was drawn from x, and the engine said with what log-probs."""
    policy = Scorer()
    groups = [[replace(sample(0, i, False), purified=i == N - 1, purified_tokens=None) for i in range(N)]]
    loss = load_algorithm("lens_resample").loss
    [evaluated] = evaluate_samples(groups, policy, Scorer(), loss, UpdateConfig(old_logprobs="engine"), 1.0)  # type: ignore[arg-type]
    assert not policy.asked
    for e in evaluated:
        assert e.proximal_original_R is not None and e.proximal_original_R.tolist() == [-1.0, -2.0]


def test_pi_old_under_x_is_scored_for_those_drawn_from_x_prime_and_kept_for_the_others() -> None:
    policy = Scorer()
    groups = [[sample(0, i, i == N - 1) for i in range(N)]]
    loss = load_algorithm("lens_no_importance").loss
    [evaluated] = evaluate_samples(groups, policy, Scorer(), loss, UpdateConfig(), 1.0)  # type: ignore[arg-type]
    for e in evaluated:
        assert (*e.sample.prompt_tokens, *e.sample.response) in policy.asked and e.proximal_original_R is not None
        assert (e.proximal_original_R is e.proximal_R) == (not e.sample.purified)
