import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_megatron.purification.noise_floor import measured_noise_floor, spread
from lens_megatron.purification.scores import interference_scores
from lens_megatron.purification.select import select_top

NAN = math.nan


def test_floor_by_hand() -> None:
    first = torch.tensor([[NAN, -1.0, -2.0], [NAN, -1.25, -2.0]])
    second = torch.tensor([[NAN, -3.0, -4.0, -5.0], [NAN, -3.5, -4.125, -5.0]])
    # spreads: .25 0 | .5 .125 0
    assert measured_noise_floor([first, second]) == 0.5
    assert measured_noise_floor([first, second], quantile=0.8) == 0.25
    assert measured_noise_floor([first, second], quantile=0.6) == 0.125


def test_spread_covers_every_pair_of_evaluations() -> None:
    evaluations = torch.tensor([[-1.0], [-1.5], [-0.75]])
    assert spread(evaluations).tolist() == [0.75]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.floats(0.01, 1))
def test_quantile_is_an_order_statistic(noise: list[float], quantile: float) -> None:
    evaluations = torch.tensor([[0.0] * len(noise), noise])
    floor = measured_noise_floor([evaluations], quantile)
    assert floor in noise
    assert sum(n <= floor for n in noise) >= quantile * len(noise) - 1e-9
    assert sum(n < floor for n in noise) < quantile * len(noise) + 1e-9


def test_noise_never_chooses_tokens() -> None:
    """bf16 weights packed differently: the very evaluations that set the floor do not rise above it, a change does."""
    generator = torch.Generator().manual_seed(0)
    exact = -5 * torch.rand(400, generator=generator)
    packings = torch.stack([exact + 0.02 * torch.randn(400, generator=generator) for _ in range(3)])
    floor = measured_noise_floor([packings])
    everything = torch.ones(400, dtype=torch.bool)
    everything[0] = False
    for one in range(3):
        for other in range(3):
            unchanged = interference_scores(packings[one], packings[other])
            assert select_top(unchanged, everything, 12, floor, "skip").positions == ()
    changed = packings[1].clone()
    changed[77] -= 1.0
    assert select_top(interference_scores(packings[0], changed), everything, 12, floor, "skip").positions == (77,)


def test_bitwise_equal_evaluations_have_floor_zero() -> None:
    assert measured_noise_floor([torch.zeros(2, 5)]) == 0.0


@pytest.mark.parametrize("prompts", [[], [torch.full((2, 1), NAN)], [torch.zeros(1, 4)]])
def test_nothing_to_measure_on_is_refused(prompts: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        measured_noise_floor(prompts)
