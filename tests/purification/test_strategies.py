from collections import Counter
from dataclasses import replace

import pytest
import torch

from lens_megatron.errors import UsageError
from lens_megatron.purification.config import PurificationConfig
from lens_megatron.purification.scores import from_optional
from lens_megatron.purification.strategies import Signals, purify
from lens_megatron.strict import build
from lens_megatron.types import Prompt, PurifiedPrompt

BOS, END = 900, 901
# template | question of ten tokens, one of them special | template
PROMPT = Prompt("p1", (BOS, 3, 10, 11, 12, 13, END, 14, 15, 16, 17, 18, 4), (2, 12), "42")
ELIGIBLE = {2, 3, 4, 5, 7, 8, 9, 10, 11}
SCORES = from_optional([None, 9.0, 0.1, 0.2, 5.0, 0.3, 9.0, 0.2, 0.1, 4.0, 0.2, 0.2, 9.0])
CONFIG = PurificationConfig(gamma=0.2)  # ceil(0.2 x 9) = 2


def run(
    config: PurificationConfig, signals: Signals | None = None, seed: int = 0, step: int = 0, prompt: Prompt = PROMPT
):
    signals = signals or Signals(scores_T=SCORES, measured_floor=0.5)
    return purify(prompt, config, {BOS, END}, signals, seed, step)


def test_interference_deletes_the_highest_eligible_scores() -> None:
    outcome = run(CONFIG)
    assert outcome.kind == "purified"
    assert outcome.purified_prompt is not None
    assert outcome.purified_prompt.deleted == (4, 9)  # not 1, 6 or 12, which score more but are not the user's
    assert outcome.roll_tokens == (BOS, 3, 10, 11, 13, END, 14, 15, 17, 18, 4)
    assert (outcome.eligible, outcome.above_floor, outcome.tied) == (9, 2, False)


def test_all_scores_in_the_noise_means_no_rescue() -> None:
    outcome = run(CONFIG, Signals(scores_T=SCORES, measured_floor=6.0))
    assert (outcome.kind, outcome.purified_prompt, outcome.roll_tokens, outcome.tied) == ("tied", None, None, True)
    by_position = run(replace(CONFIG, ties="position"), Signals(scores_T=SCORES, measured_floor=6.0))
    assert by_position.purified_prompt is not None and by_position.purified_prompt.deleted == (2, 3)
    assert by_position.tied  # still counted


def test_a_number_replaces_the_measured_floor() -> None:
    outcome = run(replace(CONFIG, noise_floor=4.5), Signals(scores_T=SCORES))
    assert outcome.purified_prompt is not None and outcome.purified_prompt.deleted == (4,)


def test_gradient_deletes_the_smallest_norms() -> None:
    norms = torch.tensor([0.0, 0.0, 7.0, 5.0, 6.0, 0.5, 0.0, 4.0, 3.0, 2.0, 1.0, 8.0, 0.0])
    outcome = run(replace(CONFIG, strategy="gradient"), Signals(gradient_norms_T=norms))
    assert outcome.purified_prompt is not None and outcome.purified_prompt.deleted == (5, 10)
    assert outcome.above_floor is None
    flat = run(replace(CONFIG, strategy="gradient"), Signals(gradient_norms_T=torch.zeros(13)))
    assert flat.kind == "tied"


def test_gradient_spares_the_last_token_of_all_from_which_nothing_is_predicted() -> None:
    bare = replace(PROMPT, tokens=PROMPT.tokens[:6], question=(0, 6))
    norms = Signals(gradient_norms_T=torch.tensor([9.0, 8.0, 7.0, 5.0, 6.0, 0.0]))
    outcome = run(replace(CONFIG, strategy="gradient"), norms, prompt=bare)
    assert outcome.purified_prompt is not None and 5 not in outcome.purified_prompt.deleted
    single = replace(PROMPT, tokens=(BOS, 10), question=(1, 2))
    outcome = run(replace(CONFIG, strategy="gradient"), Signals(gradient_norms_T=torch.zeros(2)), prompt=single)
    assert (outcome.kind, outcome.roll_tokens) == ("tied", None)


def test_random_is_uniform_over_eligible_tokens_and_fixed_by_prompt_and_step() -> None:
    config = replace(CONFIG, strategy="random")
    steps = 600
    drawn = [run(config, Signals(), step=step).purified_prompt.deleted for step in range(steps)]
    assert all(len(positions) == 2 for positions in drawn)  # the same k as interference
    counts = Counter(position for positions in drawn for position in positions)
    assert set(counts) == ELIGIBLE
    expected = 2 * steps / 9
    assert all(abs(count - expected) < 5 * (expected * 7 / 9) ** 0.5 for count in counts.values())
    assert drawn == [run(config, Signals(), step=step).purified_prompt.deleted for step in range(steps)]
    assert drawn[:20] != [run(config, Signals(), seed=1, step=step).purified_prompt.deleted for step in range(20)]
    other = replace(PROMPT, id="p2")
    assert drawn[:20] != [run(config, Signals(), step=step, prompt=other).purified_prompt.deleted for step in range(20)]


def test_resample_rolls_out_the_original_again() -> None:
    outcome = run(replace(CONFIG, strategy="resample"), Signals())
    assert (outcome.kind, outcome.purified_prompt, outcome.roll_tokens) == ("resample", None, PROMPT.tokens)
    assert outcome.rescue_prompt == PurifiedPrompt("p1", PROMPT.tokens, ())
    purified, tied = run(CONFIG), run(CONFIG, Signals(scores_T=SCORES, measured_floor=6.0))
    assert purified.rescue_prompt is purified.purified_prompt and tied.rescue_prompt is None


def test_planted_deletes_all_noise_of_the_question_and_nothing_else() -> None:
    noisy = replace(PROMPT, planted=(1, 3, 5, 6, 10))  # 1: the template's, 6: a special token
    outcome = run(replace(CONFIG, strategy="planted", gamma=0.01), Signals(), prompt=noisy)
    assert outcome.purified_prompt is not None and outcome.purified_prompt.deleted == (3, 5, 10)
    none = run(replace(CONFIG, strategy="planted"), Signals())
    assert (none.kind, none.roll_tokens, none.tied) == ("nothing_planted", None, False)


def test_a_question_without_plain_tokens_cannot_be_purified() -> None:
    empty = replace(PROMPT, question=(6, 7))
    for strategy in ("interference", "random", "gradient"):
        outcome = run(replace(CONFIG, strategy=strategy), prompt=empty)
        assert (outcome.kind, outcome.roll_tokens) == ("nothing_eligible", None)


@pytest.mark.parametrize(
    ("config", "signals", "message"),
    [
        (CONFIG, Signals(measured_floor=0.0), "needs its interference scores"),
        (CONFIG, Signals(scores_T=SCORES), "no floor was measured"),
        (CONFIG, Signals(scores_T=SCORES[:5], measured_floor=0.0), "5 interference scores for 13 tokens"),
        (replace(CONFIG, strategy="gradient"), Signals(scores_T=SCORES), "needs its gradient norms"),
    ],
)
def test_missing_measurements_are_refused(config: PurificationConfig, signals: Signals, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(config, signals)


@pytest.mark.parametrize(
    "tree", [{"gamma": 0}, {"gamma": 1}, {"gama": 0.1}, {"noise_floor": -1}, {"noise_floor": "none"},
             {"noise_quantile": 0}, {"strategy": "oracle"}]
)  # fmt: skip
def test_bad_configuration_is_one_clear_line(tree: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^run\.yaml: "):
        build(PurificationConfig, tree, "run.yaml")
