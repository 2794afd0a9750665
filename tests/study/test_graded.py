"""Partial credit, and the run files of the tasks beside the main one."""

from __future__ import annotations

import random
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from examples.study import graded, task
from lens_megatron import strict
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rewards.pool import RewardPool

STUDY = Path(task.__file__).parent


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 2))
def test_credit_ends_at_the_first_mistake(seed: int, noise: int) -> None:
    rng = random.Random(seed)
    story = task.noisy_story(rng, noise, task.TRAINED)
    answer = " ".join(str(count) for count in story.states()[1:])
    steps = len(story.steps)
    assert graded.score(task.solution(story), answer, "graded") == 1
    misled = frozenset(i for i, step in enumerate(story.steps) if step.misleads)
    if misled:
        assert graded.score(task.solution(story, misled), answer, "graded") == min(misled) / (steps + 1)
    lines = task.solution(story).split(". ")
    shown = rng.randrange(steps)
    assert graded.score(". ".join(lines[:shown]) + ".", answer, "graded") == shown / (steps + 1)


def test_what_earns_no_credit() -> None:
    right = r"Monday wins 3 + 2 = 5. Friday wins 5 + 4 = 9. Answer \boxed{ 9 }"
    for response, credit in {
        right: 3 / 3,
        right.replace("boxed{ 9 }", "boxed{ 8 }"): 2 / 3,
        r"Answer \boxed{9}": 0,  # steps have to be written out
        right.replace("= 5", "= 6"): 0,  # mistakes that cancel: the answer is right, the way is not
        right.replace(" Answer", " Sunday wins 9 + 0 = 9. Answer"): 2 / 3,  # a step that the story does not have
        "": 0,
    }.items():
        assert graded.score(response, "5 9", "graded") == credit, response


def test_workers_find_it_and_a_story_is_scored_as_here() -> None:
    tree = strict.read_yaml(STUDY / "GRADED_RUN.yaml")["rewards"]
    with RewardPool(strict.build(RewardConfig, tree, "rewards")) as pool:
        half = pool.submit("x", "graded", "5 9 7", "wins 3 + 2 = 5. wins 5 + 4 = 9. wins 9 + 1 = 10.").result()
        whole = pool.submit("y", "study-two", "10", r"Answer \boxed{10}").result()
    assert (half.reward, half.verdict) == (0.5, "partial")
    assert (whole.reward, whole.verdict) == (1.0, "correct")


def test_run_files_differ_in_the_task_alone() -> None:
    main = strict.read_yaml(STUDY / "RUN.yaml")
    for name in ("GRADED_RUN.yaml", "CONTROL_RUN.yaml"):
        other = strict.read_yaml(STUDY / name)
        assert other.keys() == main.keys()
        assert {key for key in main if main[key] != other[key]} <= {"data", "evaluation", "rewards"}
        assert {**other["data"], "train": main["data"]["train"]} == main["data"]
        assert other["evaluation"]["every"] == main["evaluation"]["every"]


def test_rows(tmp_path: Path) -> None:
    plain = list(task.prompt_rows(12, 0, "train", (0, 1, 2, 2), task.TRAINED))
    credit = list(task.prompt_rows(12, 0, "train", (0, 1, 2, 2), task.TRAINED, graded=True))
    for one, other in zip(plain, credit, strict=True):
        assert {**other, "answer": one["answer"], "source": one["source"]} == one
        assert other["answer"].split()[-1] == one["answer"] and other["source"] == "graded"
    bare = list(task.control_rows(9, 0, "bare", (5, 6, 7)))
    extra = {word for words in (*task.NOISE.values(), *task.HARMLESS.values(), task.WEATHER) for word in words}
    for row, steps in zip(bare, (5, 6, 7) * 3, strict=True):
        assert not extra & set(re.findall(r"\w+", row["prompt"])) and row["prompt"].count("On ") == steps
        assert row["planted"] == []
