"""Presets: all there, each its base plus its feature, every number with its source, nonsense refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import strict
from lens_megatron.algorithms.algorithm import AlgorithmConfig
from lens_megatron.errors import UsageError
from lens_megatron.presets import FOLDER, load_algorithm, preset_names, preset_run_values

NAMES = [
    *(
        "grpo",
        "grpo_extended",
        "grpo_weighted",
        "dapo",
        "dapo_extended",
        "greso",
        "greso_extended",
        "archer",
        "archer2",
    ),
    *("forking", "gspo", "cispo", "lens", "lens_dapo", "lens_greso", "lens_archer", "lens_forking", "lens_random"),
    *("lens_gradient", "lens_resample", "lens_no_benefit_check", "lens_no_importance", "lens_plus"),
]
NO_RESCUE: dict[str, Any] = strict.to_tree(AlgorithmConfig, AlgorithmConfig())["rescue"]
PLAIN = {"std": "unbiased", "weights": "none"}
# preset -> what turns its feature off -> the preset it then equals
FEATURES: list[tuple[str, dict[str, Any], str]] = [
    ("grpo_weighted", {"advantage": PLAIN}, "grpo"),
    ("grpo_extended", {}, "grpo"),
    ("dapo_extended", {}, "dapo"),
    ("greso_extended", {}, "greso"),
    ("greso", {"filter": {"mode": "none"}, "loss": {"kl_coef": 0.001}}, "grpo"),
    ("archer", {"loss": {"entropy_split": None, "dual_clip": None}}, "grpo"),
    ("archer2", {"loss": {"surrogate": "clip", "dual_clip": None, "entropy_split": None}}, "grpo"),
    ("forking", {"loss": {"entropy_split": None}}, "dapo"),
    (
        "dapo",
        {
            "filter": {"mode": "none"},
            "advantage": {"overlong": None},
            "loss": {"clip_high": 0.2, "dual_clip": None, "kl_coef": 0.001},
        },
        "grpo",
    ),
    (
        "gspo",
        {
            "loss": {
                "ratio": "token",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "aggregation": "token_mean",
                "kl_coef": 0.001,
            }
        },
        "grpo",
    ),
    ("cispo", {"loss": {"surrogate": "clip", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.001}}, "grpo"),
    ("lens", {"rescue": NO_RESCUE, "advantage": PLAIN}, "grpo"),
    ("lens", {"rescue": NO_RESCUE}, "grpo_weighted"),
    ("lens_dapo", {"rescue": NO_RESCUE, "advantage": PLAIN}, "dapo"),
    ("lens_greso", {"rescue": NO_RESCUE, "advantage": PLAIN}, "greso"),
    ("lens_archer", {"rescue": NO_RESCUE, "advantage": PLAIN}, "archer"),
    ("lens_forking", {"rescue": NO_RESCUE, "advantage": PLAIN}, "forking"),
    ("lens_random", {"rescue": {"strategy": "interference"}}, "lens"),
    ("lens_gradient", {"rescue": {"strategy": "interference"}}, "lens"),
    ("lens_resample", {"rescue": {"strategy": "interference"}, "loss": {"purified_ratio": "literal"}}, "lens"),
    ("lens_no_benefit_check", {"rescue": {"benefit_check": True}}, "lens"),
    ("lens_no_importance", {"loss": {"purified_ratio": "literal"}}, "lens"),
    (
        "lens_plus",
        {
            "rescue": {"keep_failures": 0},
            "advantage": {"weights": "all"},
            "loss": {"purified_ratio": "literal"},
        },
        "lens",
    ),
]


def same(a: AlgorithmConfig, b: AlgorithmConfig) -> None:
    """GRESO's own numbers stay in the tree when the filter is off; nothing reads them then."""
    trees = [strict.to_tree(AlgorithmConfig, value) for value in (a, b)]
    assert trees[0] == trees[1]


def test_every_preset_is_there() -> None:
    assert preset_names() == sorted(NAMES)


@pytest.mark.parametrize(("name", "off", "base"), FEATURES, ids=[f"{name}-{base}" for name, _, base in FEATURES])
def test_a_preset_without_its_feature_is_its_base(name: str, off: dict[str, Any], base: str) -> None:
    same(load_algorithm({"preset": name, **off}), load_algorithm(base))


def test_every_preset_but_grpo_has_a_feature_tested() -> None:
    assert {name for name, _, _ in FEATURES} | {"grpo"} == set(NAMES)


def test_a_feature_is_more_than_nothing() -> None:
    """Turning it off changes the algorithm, or, for the extended ones, what the run is given."""
    for name, off, base in FEATURES:
        if off:
            assert load_algorithm(name) != load_algorithm(base)
        else:
            assert preset_run_values(name) != preset_run_values(base)


@pytest.mark.parametrize("name", ["lens_dapo", "lens_greso", "lens_archer", "lens_forking"])
def test_combinations_have_the_rescue_and_the_advantage_of_lens(name: str) -> None:
    combined, lens = load_algorithm(name), load_algorithm("lens")
    assert combined.rescue == lens.rescue
    assert (combined.advantage.std, combined.advantage.weights) == (lens.advantage.std, lens.advantage.weights)
    assert combined.loss.purified_ratio == "literal"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_comment_beside_it(name: str) -> None:
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        cited_above = name in ("greso", "archer2")  # "as every number here"
        if re.search(r":\s*[{\[]?.*\d", value) and not comment.strip():
            assert cited_above, f"{name}.yaml: {line}"


def test_numbers_the_papers_print() -> None:
    lens = load_algorithm("lens")
    assert (lens.rescue.tau, lens.loss.kl_coef, lens.loss.aggregation) == (0.5, 0.001, "token_mean")
    run = preset_run_values("lens")
    assert run["rollout"] == {"n": 8, "max_response_tokens": 4096, "temperature": 1.0, "top_p": 1.0}
    assert run["optimizer"]["lr"] == 1e-6 and run["data"]["prompts_per_step"] == 128
    assert preset_run_values("grpo_extended")["rollout"]["n"] == 16
    plus = load_algorithm("lens_plus")
    assert (plus.rescue.keep_failures, plus.advantage.weights, plus.loss.purified_ratio) == (2, "none", "floor(0.3)")


REFUSED = [
    ({"preset": "lens", "rescue": {"strategy": "resample"}}, "no x'"),
    ({"preset": "lens_resample", "loss": {"purified_ratio": "floor(0.3)"}}, "no x'"),
    ({"preset": "grpo", "loss": {"purified_ratio": "mixture(token)"}}, "rescue.mode none"),
    ({"preset": "lens", "loss": {"purified_ratio": "mixture(token)"}}, "replacement: union"),
    ({"preset": "lens", "rescue": {"replacement": "union"}}, "mixture"),
    ({"preset": "grpo", "loss": {"imitation_coef": 0.001}}, "imitation_coef"),
    (
        {
            "preset": "lens",
            "rescue": {"replacement": "union"},
            "loss": {"purified_ratio": "mixture(token)", "imitation_coef": 0.001},
        },
        "keeps failures among them",
    ),
    ({"preset": "grpo", "loss": {"surrogate": "aspo"}}, "set loss.dual_clip"),
    ({"preset": "grpo", "loss": {"kl_scope": "original"}}, "kl_scope"),
    ({"preset": "grpo", "advantage": {"weights": "rescued_only"}}, "rescued groups"),
    ({"preset": "gspo", "loss": {"surrogate": "cispo"}}, "needs ratio: token"),
    ({"preset": "cispo", "loss": {"dual_clip": 3.0}}, "clipped already"),
    ({"preset": "archer", "loss": {"ratio": "sequence"}}, "one number for all its tokens"),
    ({"preset": "archer", "loss": {"entropy_split": {"denominator": "full"}}}, "train_on is all"),
    ({"preset": "lens", "advantage": {"baseline": "original"}}, "std: none"),
    ({"preset": "grpo", "loss": {"surrogate": "reinforce"}}, "none of clip, cispo, aspo"),
    ({"preset": "lens", "loss": {"purified_ratio": "floor"}}, r"floor\(C\)"),
    ({"preset": "lens", "loss": {"purified_ratio": "floor(2)"}}, r"\(0, 1\]"),
    ({"preset": "lens", "loss": {"purified_ratio": "mixture"}}, r"mixture\(token\)"),
    ({"preset": "grpo", "loss": {"clip_lo": 0.1}}, r"did you mean '(loss\.)?clip_low'"),
    ({"preset": "grpo", "loss": {"engine_correction": {"mode": "truncate", "cap": 0.5}}}, "1 <= cap"),
    ({"preset": "len"}, "did you mean 'lens'"),
    *(
        ({"preset": "lens", "loss": {"ratio": "sequence", "purified_ratio": kind}}, "1 / L of theirs")
        for kind in ("floor(0.3)", "power(1.0)", "luffy", "gspo")
    ),
    ({"preset": "archer2", "rescue": {"mode": "purification"}}, "just these would weigh most"),
    ({"preset": "grpo", "loss": {"kl": "k1"}}, "mean 0"),
    ({"preset": "grpo", "rescue": {"strategy": "resample", "tau": 0.25}}, "rescue.strategy does nothing"),
    ({"preset": "grpo", "rescue": {"gamma": 0.05}}, "rescue.gamma does nothing"),
    (
        {"preset": "greso", "advantage": {"baseline": "tests.algorithms.test_advantages:half", "std": "none"}},
        "from which the baseline",
    ),
    ({"preset": "grpo", "filter": {"size_factor": 2.0}}, "filter.size_factor does nothing"),
    ({"preset": "dapo", "filter": {"greso": {"hard_at": 0.0}}}, "filter.greso does nothing"),
    ({"preset": "grpo", "loss": {"engine_correction": {"cap": 3.0}}}, "cap and floor do nothing"),
    ("gpro", "did you mean 'grpo'"),  # not gspo, which is as near by difflib
    ("no_such_thing", "no preset"),
    (3, "expected a preset's name"),
]


@pytest.mark.parametrize(("choice", "reason"), REFUSED)
def test_what_means_nothing_is_refused_with_the_reason(choice: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        load_algorithm(choice)
    assert "\n" not in str(caught.value)


def test_what_is_near_a_refusal_is_taken() -> None:
    for choice in (
        {"preset": "grpo_weighted", "rescue": {"success_threshold": 1.0}},  # Eq. 4 asks for it without any rescue
        {"preset": "lens", "rescue": {"mode": "none"}},  # an ablation of a preset that leaves the defaults as they are
        {"preset": "lens", "loss": {"ratio": "length_normalised", "purified_ratio": "floor(0.3)"}},
        {"preset": "archer2", "rescue": {"mode": "purification"}, "loss": {"purified_ratio": "floor(0.3)"}},
        {"preset": "lens_dapo", "loss": {"kl": "k1"}},  # an estimate in the metrics, and no loss
    ):
        load_algorithm(choice)


def test_a_path_is_a_preset_and_may_have_a_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: lens\nrescue: {tau: 0.25}\nrun: {steps: 5}\n")
    (tmp_path / "yours.yaml").write_text("base: ./mine.yaml\nloss: {kl_coef: 0}\n")
    assert load_algorithm(str(tmp_path / "yours.yaml")) == load_algorithm(
        {"preset": "lens", "rescue": {"tau": 0.25}, "loss": {"kl_coef": 0.0}}
    )
    assert preset_run_values(str(tmp_path / "yours.yaml"))["steps"] == 5


def test_presets_that_are_each_others_base_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: ./b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(UsageError, match="a -> b -> a"):
        load_algorithm(str(tmp_path / "a.yaml"))


def test_a_mapping_without_a_preset_starts_from_the_defaults() -> None:
    assert load_algorithm({"loss": {"kl_coef": 0.0}}).loss.kl_coef == 0.0


def test_which_algorithms_need_a_reference() -> None:
    assert load_algorithm("grpo").needs_reference and load_algorithm("archer").needs_reference
    assert not load_algorithm("dapo").needs_reference
    assert load_algorithm("lens_dapo").needs_reference  # its KL is off, Eq. 1 is not
    assert not load_algorithm({"preset": "lens_dapo", "rescue": {"strategy": "random"}}).needs_reference
