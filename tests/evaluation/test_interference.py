"""Figures 2b and 2c: the comparison against rates known beforehand, and the command on tiny models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lens_megatron import cli
from lens_megatron.errors import UsageError
from lens_megatron.evaluation.answering import Answer
from lens_megatron.evaluation.interference import InterferenceConfig, compare, tree_of
from lens_megatron.evaluation.interference_page import interference_page, rows
from lens_megatron.evaluation.sets import Question
from lens_megatron.purification.select import delete
from lens_megatron.purification.strategies import Strategy
from lens_megatron.scoring import ScoredPrompt, ScoreResult
from lens_megatron.types import Prompt, PurifiedPrompt
from tests.data.tokenizers import byte_level
from tests.test_score import save_model

PROMPTS = [Prompt(f"p{i}", (1, 2, 3, 4, 100 + i), (0, 5), "yes") for i in range(1500)]
SCORED = ScoreResult(
    [
        ScoredPrompt(
            list(p.tokens), ["x"] * 5, [], [], [None, 0.1, 0.0, 0.3, 0.2], [False, True, True, True, True], [], []
        )
        for p in PROMPTS
    ],
    1e-6,
)
SAME_MODELS = ScoreResult([replace(one, scores=[None, *[0.0] * 4]) for one in SCORED.prompts[:3]], 0.0)


class Sampled:
    """Right with a chance that depends on the prompt and on whether its token 3 is still there."""

    def __init__(self, rescued: float) -> None:
        self.rescued = rescued
        self.asked: list[Question] = []

    def __call__(self, wanted: Sequence[Question]) -> Mapping[tuple[str, str, int, str], Answer]:
        self.asked += wanted
        answers = {}
        for question in wanted:
            chance = 0.3 if 3 in question.prompt.tokens else self.rescued
            reward = float(random.Random(question.seed).random() < chance)
            verdict = "correct" if reward else "wrong"
            set_name, prompt_id, index, prompt = question.key
            answers[question.key] = Answer(set_name, prompt_id, index, prompt, "", 1, "stop", reward, verdict, "", "")
        return answers


def purified() -> dict[tuple[Strategy, float], dict[str, PurifiedPrompt]]:
    """interference deletes token 3 at every gamma; random deletes one that does not matter, of most prompts."""
    return {
        ("interference", 0.01): {p.id: delete(p, [2]) for p in PROMPTS},
        ("interference", 0.02): {p.id: delete(p, [2]) for p in PROMPTS},
        ("random", 0.01): {p.id: delete(p, [1]) for p in PROMPTS[100:]},
        ("random", 0.02): {},
    }


def test_the_control_takes_away_what_the_choice_of_prompts_gives() -> None:
    config = InterferenceConfig(strategies=["interference", "random"], gammas=[0.01, 0.02])
    draw = Sampled(rescued=0.8)
    found = compare(PROMPTS, purified(), draw, SCORED, config)
    same, shared, random_one, none = found.conditions
    assert found.success == pytest.approx(0.3, abs=0.03)
    assert found.before is not None and found.before < 0.27  # chosen for failing
    assert found.resampled == pytest.approx(0.3, abs=0.03)  # regression to the mean
    assert same.after == pytest.approx(0.8, abs=0.03) and same.gain == pytest.approx(0.5, abs=0.04)
    assert same.gain_interval is not None and same.gain_interval.low > 0.4
    assert same.improved is not None and same.improved > 0.95
    assert (shared.after, shared.gain) == (same.after, same.gain)  # the same x' is answered once
    # deleting what does not matter: seems to help against the first draw, and does not against the control
    assert random_one.prompts < found.failed
    assert random_one.after is not None and random_one.before is not None and random_one.after > random_one.before
    assert random_one.gain == pytest.approx(0.0, abs=0.04)
    assert random_one.improved == pytest.approx(random_one.improved_by_resampling, abs=0.08)
    assert (
        random_one.improved is not None and random_one.improved > 0.3
    )  # which without the control looks like a success
    assert (none.prompts, none.after) == (0, None)
    again = [question for question in draw.asked if question.set == "again"]
    assert len(draw.asked) == 8 * (1500 + 2 * found.failed + random_one.prompts)
    assert len(again) == 8 * found.failed and len({question.key for question in draw.asked}) == len(draw.asked)
    assert len({question.seed for question in draw.asked}) == len(draw.asked)
    tree = json.loads(json.dumps(tree_of(found), allow_nan=False))
    assert tree["score_histogram"]["zero_share"] == 0.25
    assert tree["deleted_score_histogram"]["tokens"] == 1500  # of position 2, whose score is 0
    assert tree["deleted_score_histogram"]["zero_share"] == 1.0
    page = interference_page(found, "m<b>", "r", config)
    assert "Figure 2b" in page and page.count("<svg") == 3 and "<b>:" not in page
    assert len(rows(found)) == 4


def test_nothing_failed_or_nothing_differs() -> None:
    config = InterferenceConfig(strategies=["random"], gammas=[0.02])
    all_right = Sampled(1.0)
    easy = [delete(prompt, [2]) for prompt in PROMPTS[:3]]  # without the token that makes them fail
    prompts = [replace(p, tokens=x.tokens) for p, x in zip(PROMPTS, easy, strict=False)]
    found = compare(prompts, {("random", 0.02): {}}, all_right, SAME_MODELS, config)
    assert (found.failed, found.before, found.conditions[0].prompts) == (0, None, 0)
    page = interference_page(found, "m", "r", config)
    assert "No prompt failed" in page and "the two models are the same" in page


def test_settings_that_cannot_be_meant() -> None:
    from lens_megatron import strict

    for tree, message in (
        ({"strategies": ["resample"]}, "resampling is the control"),
        ({"gammas": []}, "at least one"),
        ({"gammas": [1.5]}, "between 0 and 1"),
        ({"engine": "vllm"}, "embedded"),
    ):
        with pytest.raises(UsageError, match=message):
            strict.build(InterferenceConfig, tree, "analyze")


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny random models; a reward that a response of random bytes can earn. Run again, nothing is generated."""
    for name, noise in (("policy", 0.05), ("reference", 0.0)):
        tokenizer = byte_level(tmp_path / name)
        save_model(tmp_path / name, len(tokenizer) + 7, noise)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"How many clips in {i}?", "answer": "1"}) + "\n" for i in range(6)))
    command = ["analyze", "interference", str(tmp_path / "policy"), "--reference", str(tmp_path / "reference")]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    command += ["gammas=[0.05, 0.3]", "samples=2", "max_response_tokens=6", "rewards.workers=1"]
    command += ["rewards.default.kind=function", "rewards.default.function=tests.loop.loop_rewards:by_hash"]
    assert cli.main(command) == 0
    first: Any = json.loads((tmp_path / "a.json").read_text())
    assert first["prompts"] == 6 and 0 < first["failed"] <= 6
    kinds = [(one["strategy"], one["gamma"]) for one in first["conditions"]]
    assert kinds == [(s, g) for s in ("interference", "random", "gradient") for g in (0.05, 0.3)]
    assert all(one["prompts"] == first["failed"] for one in first["conditions"])
    by_gamma = {one["gamma"]: one["deleted"] for one in first["conditions"]}
    assert by_gamma[0.3] > by_gamma[0.05] >= 1
    lines = (tmp_path / "out" / "answers.jsonl").read_text()
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == first
    assert (tmp_path / "out" / "answers.jsonl").read_text() == lines
    assert "Figure 2c" in (tmp_path / "out" / "interference.html").read_text()
    assert "prompts failed" in capsys.readouterr().out
