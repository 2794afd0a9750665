"""The study's task: answers follow from the text alone, noise stands where the rows say, splits differ in what they should."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.study import task
from lens_megatron.data import toy
from lens_megatron.data.config import DataConfig
from lens_megatron.data.prompts import load_prompts
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer

SIZES = task.Sizes(supervised=200, train=64, noisy=40, other=20)
NOISE = {word for words in task.NOISE.values() for word in words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    task.write_task(made, 0, SIZES)
    return made


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def read_aloud(question: str) -> int:
    """The answer, from the text alone."""
    count = int(re.search(r"has (\d+)", question).group(1))  # type: ignore[union-attr]
    for verb, amount in re.findall(r"(\w+) (\d+)", question)[1:]:
        assert verb in toy.GAINS + toy.LOSSES
        count += int(amount) if verb in toy.GAINS else -int(amount)
    return count


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(0, 2), st.sampled_from([("sign",), ("amount",), ("skip",), tuple(task.NOISE)])
)
def test_a_story_its_answer_and_its_solutions_agree(seed: int, noise: int, kinds: tuple[str, ...]) -> None:
    rng = random.Random(seed)
    story = task.noisy_story(rng, noise, kinds)
    assert str(read_aloud(story.question())) == story.answer()
    noisy = [i for i, step in enumerate(story.steps) if step.misleads]
    assert len(noisy) == noise
    for misled in (frozenset(), frozenset(noisy), frozenset(noisy[:1])):
        lines = re.findall(r"(\w+) (\w+) (\d+) ([+-]) (\d+) = (\d+)\.", task.solution(story, misled))
        counts = story.states(misled)
        assert len(lines) == len(story.steps) and all(0 <= count <= toy.LARGEST for count in counts)
        for i, ((day, verb, before, sign, amount, after), step) in enumerate(zip(lines, story.steps, strict=True)):
            assert (day, verb) == (step.day, step.verb) and (int(before), int(after)) == (counts[i], counts[i + 1])
            assert int(after) == int(before) + int(sign + amount)
            right = step.amount if step.verb in toy.GAINS else -step.amount
            wrong = (
                {
                    "sign": -right,
                    "amount": right + (1 if right > 0 else -1),
                    "skip": 0,
                }[next(kind for kind, f in task.FIELD.items() if getattr(step, f) in task.NOISE[kind])]
                if i in misled
                else right
            )
            assert int(after) - int(before) == wrong


def test_rows_say_where_the_noise_is(folder: Path) -> None:
    for name in ("train", "noisy", "clean", "unseen"):
        kinds = NOISE if name != "unseen" else set(task.NOISE["skip"])
        for row in rows(folder, name):
            marked = [row["prompt"][start:end] for start, end in row["planted"]]
            assert marked == [word for word in re.findall(r"\w+", row["prompt"]) if word in NOISE]
            assert len(marked) == {"study-plain": 0, "study-one": 1, "study-two": 2}[row["source"]]
            assert set(marked) <= kinds and str(read_aloud(row["prompt"])) == row["answer"]


def test_splits(folder: Path) -> None:
    seen = {row["prompt"] for row in rows(folder, "train")}
    held_out = [row["prompt"] for name in ("noisy", "clean", "unseen") for row in rows(folder, name)]
    assert len(seen) == SIZES.train and len(set(held_out)) == len(held_out) == 80 and not seen & set(held_out)
    trained = {word for prompt in seen for word in re.findall(r"\w+", prompt)}
    assert not trained & set(task.NOISE["skip"]) and trained & set(task.NOISE["sign"])
    supervised = {word for row in rows(folder, "sft") for word in re.findall(r"\w+", row["prompt"])}
    assert supervised >= set(task.NOISE["skip"])  # the base is misled by noise that reinforcement learning never sees
    for noisy, purified in zip(rows(folder, "noisy"), rows(folder, "purified"), strict=True):
        words = [word for word in noisy["prompt"].replace(".", " .").split() if word not in NOISE]
        assert purified["prompt"].replace(".", " .").split() == words
        assert purified["answer"] == noisy["answer"] and "  " not in purified["prompt"]


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    task.write_task(tmp_path, 0, SIZES)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 9 and all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_every_word_has_a_token_and_noise_is_one_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    check_tokenizer(tokenizer, task.VOCABULARY)
    prompts = load_prompts(
        DataConfig(str(folder / "train.jsonl"), max_prompt_tokens=128), tokenizer, toy.TEMPLATE
    ).prompts
    assert len(prompts) == SIZES.train
    for prompt in prompts:
        assert tokenizer.unk_token_id not in prompt.tokens
        assert {tokenizer.decode([prompt.tokens[t]]) for t in prompt.planted} <= NOISE
        assert len(prompt.planted) == sum(word in NOISE for word in re.findall(r"\w+", prompt.text))
