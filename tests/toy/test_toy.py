"""The toy task: its stories add up, its misleading words mislead as often as they say, everything is reproducible."""

from __future__ import annotations

import collections
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_megatron.data import toy
from lens_megatron.data.config import DataConfig, SupervisedDataConfig
from lens_megatron.data.prompts import load_prompts
from lens_megatron.data.supervised import load_supervised
from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer, stop_tokens

SIZES = toy.ToySizes(supervised=300, train=80, test=40)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    toy.write_toy(made, 0, SIZES)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder / "model"))


def read_aloud(question: str) -> int:
    """The answer, from the text alone."""
    count = int(re.search(r"has (\d+)", question).group(1))  # type: ignore[union-attr]
    for verb, amount in re.findall(r"(\w+) (\d+) \w+\.", question)[1:]:
        count += int(amount) if verb in toy.GAINS else -int(amount)
    return count


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 4), st.integers(4, 7))
def test_a_story_its_answer_and_its_solution_agree(seed: int, misleading: int, steps: int) -> None:
    rng = random.Random(seed)
    story = toy.make_story(rng, misleading, steps)
    assert str(read_aloud(story.question())) == story.answer()
    assert sum(word in toy.MISLEADING for word in story.question().split()) == misleading
    misled = toy.misled_steps(rng, story)
    for solution, wrong in ((story.solution(), frozenset()), (story.solution(misled), misled)):
        lines = re.findall(r"(\w+) (\d+) ([+-]) (\d+) = (\d+)\.", solution)
        assert len(lines) == steps
        for i, (line, step) in enumerate(zip(lines, story.steps, strict=True)):
            day, before, sign, amount, after = line
            assert int(after) == int(before) + int(amount) * (1 if sign == "+" else -1)
            assert 0 <= int(after) <= toy.LARGEST
            assert day == step.day and int(amount) == step.amount
            assert (sign == "+") == (step.gain != (i in wrong))
        assert solution.endswith(f"\\boxed{{{lines[-1][-1]}}}")


def test_words_mislead_as_often_as_they_say() -> None:
    rng = random.Random(0)
    seen: collections.Counter[str] = collections.Counter()
    misled: collections.Counter[str] = collections.Counter()
    for _ in range(3000):
        story = toy.make_story(rng, 2, 5)
        wrong = toy.misled_steps(rng, story)
        for i, step in enumerate(story.steps):
            seen[step.adverb] += 1
            misled[step.adverb] += i in wrong
    for word in ("", *toy.HARMLESS, *toy.MISLEADING):
        assert misled[word] / seen[word] == pytest.approx(toy.MISLEADING.get(word, 0.0), abs=0.06)


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    toy.write_toy(tmp_path, 0, SIZES)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {"sft.jsonl", "train.jsonl", "test.jsonl"} <= {str(path) for path in files}
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)
    toy.write_toy(tmp_path, 1, SIZES)
    assert (folder / "train.jsonl").read_bytes() != (tmp_path / "train.jsonl").read_bytes()


def test_training_and_held_out_prompts_differ(folder: Path) -> None:
    train, test = (
        {json.loads(line)["prompt"] for line in (folder / name).read_text().splitlines()}
        for name in ("train.jsonl", "test.jsonl")
    )
    assert (len(train), len(test)) == (SIZES.train, SIZES.test) and not train & test


def test_every_word_has_a_token_and_text_survives(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoConfig

    check_tokenizer(tokenizer, AutoConfig.from_pretrained(str(folder / "model")).vocab_size)
    assert stop_tokens(tokenizer) == (tokenizer.eos_token_id,)
    data = SupervisedDataConfig(str(folder / "sft.jsonl"))
    examples, _ = load_supervised(data, tokenizer, toy.TEMPLATE)
    unknown = tokenizer.unk_token_id
    assert all(unknown not in (*example.prompt, *example.response) for example in examples)
    assert max(len(example.prompt) + len(example.response) for example in examples) <= 110
    text = tokenizer.decode(examples[1].response, skip_special_tokens=True)
    assert re.search(r"Answer \\boxed\{ \d+ ?\}$", text)


@pytest.mark.parametrize("template", [toy.TEMPLATE, "chat"])
def test_prompts_load_with_the_question_marked(folder: Path, tokenizer: Any, template: str) -> None:
    loaded = load_prompts(DataConfig(str(folder / "train.jsonl"), max_prompt_tokens=96), tokenizer, template)
    assert len(loaded.prompts) == SIZES.train and loaded.too_long == 0
    assert collections.Counter(prompt.source for prompt in loaded.prompts) == {
        "toy-plain": 20,
        "toy-one": 20,
        "toy-two": 40,
    }
    for prompt in loaded.prompts:
        start, end = prompt.question
        assert tokenizer.decode(prompt.tokens[:start]) == "Question :"
        assert tokenizer.decode(prompt.tokens[end:]) == "Answer :"
        assert str(read_aloud(prompt.text)) == prompt.answer


def test_the_example_script_writes_it(tmp_path: Path) -> None:
    script = REPOSITORY / "examples/toy/make_data.py"
    sizes = ["--supervised", "9", "--train", "8", "--test", "4"]
    done = subprocess.run([sys.executable, str(script), "--out", str(tmp_path), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("sft", "train", "test")] == [
        9,
        8,
        4,
    ]
